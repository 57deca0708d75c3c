"""Log of a sweep's trials: on disk, in their own MLflow runs, and in the parent run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.overrides import flatten
from pipeline.data.identity import check_data_of, data_sha256
from pipeline.tracking import Tracker, end_abandoned, send_rest
from pipeline.tracking.open_run import commit
from pipeline.tracking.outbox import replace_file
from pipeline.tracking.queries import KIND, PARENT
from pipeline.tracking.record_log import ChildRecord, RecordLog
from pipeline.tune.asha import Report
from pipeline.tune.search import Known, next_point
from pipeline.tune.sweep_request import Prospect, SweepRequest, prospect

OVER = ("finished", "stopped", "infeasible")
SPLIT = "validation"  # whose images the trials are compared on


@dataclass(kw_only=True)
class TrialRecord(ChildRecord):
    """One trial: ``running``, ``finished``, ``stopped`` early, ``infeasible``, ``failed`` or
    ``preempted``."""

    trial: str
    point: dict[str, Any]
    status: str = "running"

    @property
    def over(self) -> bool:
        """Whether it is not to be run (again)."""
        return self.status in OVER


class TrialLog(RecordLog[TrialRecord]):
    """Trials of a sweep, logged on disk and in MLflow.

    Attributes:
        reports: Reports that the scheduler has had, in their order.
    """

    def __init__(self, request: SweepRequest):
        super().__init__(request.folder, "trials.json")
        self.request = request
        self.reports: list[Report] = []
        self.halted: dict[str, int] = {}
        self._open: dict[str, Tracker] = {}
        self._began: dict[str, float] = {}
        if (kept := self.read(read_trials)) is None:
            self.sha256 = data_sha256(request.base.dataset)
            return
        self.entries, self.reports, then = kept
        what = f"sweep {self.folder.name}"
        self.sha256 = check_data_of(what, then, request.base.dataset, print)

    @property
    def left(self) -> int:
        """Count the trials that are yet to run."""
        return sum(not e.over for e in self.entries) + self.request.samples - len(self.entries)

    def begin(self) -> None:
        """Open the parent run, and send what the trials that are over still have in their journals.

        A process that was killed may have left MLflow runs open: those of trials that are to go on
        are taken up when these are.
        """
        request = self.request
        self.open_parent(
            request.base,
            {key: str(value) for key, value in self.plan().items()},
            {KIND: "sweep", "space": request.name, "num_samples": str(request.samples)},
        )
        text = {key: value for key, value in self.plan().items() if key in SWEEP_JSON}
        replace_file(self.folder / "sweep.json", json.dumps(text, indent=2) + "\n")
        self.tracker.upload(self.folder, ["sweep.json"], timeout=5.0)
        for entry in self.entries:
            folder = request.trial_folder(entry.trial)
            if entry.over:
                end_abandoned(folder, request.base.tracking_uri, entry.status)
            elif entry.status == "failed":
                send_rest(folder, request.base.tracking_uri)

    def plan(self) -> dict[str, Any]:
        """Return the search's settings."""
        request = self.request
        return {
            "space": request.name,
            "preset": request.preset,
            "objectives": [list(pair) for pair in request.space.objectives],
            "keys": list(request.keys),
            "split": SPLIT,
            "tier": "smoke",
            "search": request.search,
            "scheduler": request.scheduler,
            "max_gmac": request.max_gmac,
        }

    def varied(self, point: Mapping[str, Any]) -> dict[str, str]:
        """Write a point as the parameters of a run, whether or not there is such a run."""
        return {key: str(value) for key, value in {**flatten(self.request.base), **point}.items()}

    def next(self) -> TrialRecord | None:
        """Return the next trial to run, those of an earlier process first; None: there is none.

        Points that cannot be run are noted, with the reason, on the way.
        """
        while (entry := self.turn()) is not None:
            found = prospect(self.request, entry.trial, entry.point)
            self.start(entry, found)
            if not found.reason:
                return entry
            self.end(entry.trial, "infeasible", found.reason)
        return None

    def turn(self) -> TrialRecord | None:
        """Return the trial whose turn it is, with a new point if need be."""
        for entry in self.entries:
            tried = entry.trial in self._began  # what fails now waits for the next process
            if not (entry.over or tried):
                return entry
        if (index := len(self.entries)) >= self.request.samples:
            return None
        self.entries.append(
            TrialRecord(trial=f"{index:03d}", point=next_point(self.request, index, self.known()))
        )
        return self.entries[-1]

    def start(self, entry: TrialRecord, found: Prospect) -> None:
        """Open or continue the MLflow run of a trial, and log the cost of its net."""
        config, folder = found.config, self.request.trial_folder(entry.trial)
        parent = self.tracker.run_id
        tags = {"commit": commit(), "trial": entry.trial, "run_folder": str(folder)}
        tags |= {PARENT: parent} if parent else {}
        if config is not None:
            tags["fingerprint"] = config.fingerprint
        tracker = Tracker.open(
            folder,
            tracking_uri=self.request.base.tracking_uri,
            experiment=self.request.base.experiment,
            name=f"{self.request.name}-{entry.trial}",
            params=self.varied(flatten(config) if config else entry.point),
            tags=tags,
        )
        if found.costs:
            tracker.handle({"kind": "metrics", "step": 0, "values": found.costs})
        self._open[entry.trial], self._began[entry.trial] = tracker, time.monotonic()
        entry.status, entry.reason = "running", ""
        entry.metrics |= found.costs
        self.write()

    def entry(self, trial: str) -> TrialRecord:
        """Find a trial."""
        return self.entries[int(trial)]

    def handle(self, event: Mapping[str, Any]) -> None:
        """Pass an event of a trial on to its MLflow run; late ones of a stopped trial are lost."""
        tracker = self._open.get(event["trial"])
        if tracker is None:
            return
        tracker.handle(event)
        if event["kind"] == "metrics":
            kept = {k: v for k, v in event["values"].items() if k.startswith(("val/", "cost/"))}
            self.entry(event["trial"]).metrics |= kept

    def note(self, report: Report) -> None:
        """Log a report that the scheduler gets."""
        self.reports.append(report)
        self.write()

    def halt(self, trial: str, epoch: int) -> None:
        """Remember that the scheduler stops a trial; end it if it is not running now."""
        self.halted[trial] = epoch
        if trial not in self._open and not self.entry(trial).over:
            self.start(self.entry(trial), prospect(self.request, trial, self.entry(trial).point))
            self.end(trial, "stopped", f"by ASHA after epoch {epoch}")

    def end(self, trial: str, status: str, reason: str = "") -> TrialRecord:
        """Note the end of a trial, and end its MLflow run."""
        entry, tracker = self.entry(trial), self._open.pop(trial)
        entry.status, entry.reason = status, reason
        entry.seconds += time.monotonic() - self._began[trial]
        if reason:
            tracker.handle({"kind": "tag", "key": "reason", "value": reason})
        tracker.close(status, timeout=5.0 if status == "preempted" else 20.0)
        entry.run_id = tracker.run_id
        self.write()
        return entry

    def known(self) -> list[Known]:
        """List the trials for the search: one that was stopped counts with what it had reached."""
        aims = [metric for metric, _ in self.request.space.objectives]
        found: list[Known] = []
        for entry in self.entries:
            reached = dict(entry.metrics) if entry.over else {}
            reached.setdefault("val/ra_worst", reached.get("val/ra", 0.0))
            whole = entry.over and all(aim in reached for aim in aims)
            found.append((entry.point, {aim: reached[aim] for aim in aims} if whole else None))
        return found

    def write(self) -> None:
        """Write the log to disk."""
        trials = [asdict(entry) for entry in self.entries]
        kept = {"dataset_sha256": self.sha256, "trials": trials, "reports": self.reports}
        self.save(kept)

    def close(self, status: str) -> bool:
        """End the MLflow runs that are open; return whether MLflow has everything."""
        if self._tracker is None:
            return True
        for trial in list(self._open):
            self.end(trial, "preempted" if status == "preempted" else "failed")
        return self.close_parent(status, "trials", (*OVER, "failed"))


def read_trials(kept: Any) -> tuple[list[TrialRecord], list[Report], str | None]:
    """Read what ``TrialLog.write`` wrote: trials, reports, and the sha256 of the data."""
    reports = [(str(name), int(epoch), float(value)) for name, epoch, value in kept["reports"]]
    return [TrialRecord(**entry) for entry in kept["trials"]], reports, kept.get("dataset_sha256")


SWEEP_JSON = ("space", "preset", "objectives", "keys", "split", "tier")
