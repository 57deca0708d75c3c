"""Tracker of one run: events in, a journal on disk, and no long wait for MLflow."""

import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.client import mlflow_client, resolve_uri
from pipeline.tracking.database_file import to_path, to_uri
from pipeline.tracking.model_logging import write_model
from pipeline.tracking.outbox import Journal, SenderThread
from pipeline.tracking.sender import RunSender, load_info
from pipeline.tracking.state_file import read_state

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

LOG = logging.getLogger(__name__)
WAIT = "ROBUST_MOE_TRACKING_WAIT"
BUILDING = 60.0  # seconds that a sqlite file may take at least: its first use builds the tables
STATUSES = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "preempted": "KILLED",
    "stopped": "KILLED",  # by a sweep's scheduler
    "infeasible": "KILLED",  # a point of a sweep that could not be run
}
RESULTS = (
    "config.json",
    "card.md",
    "claim.json",
    "plots",
    "checkpoints/best",
)  # what a run folder uploads


class OutageError(ConnectionError):
    """MLflow is away, and the run must not go on without it."""


def patience() -> float:
    """Read how many seconds a run waits for MLflow at its start and at its end, each at most.

    Raises:
        ValueError: ``ROBUST_MOE_TRACKING_WAIT`` is no number above 0.
    """
    text = os.environ.get(WAIT) or "20"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{WAIT} must be a number of seconds above 0, got {text!r}")
    return seconds


class Tracker:
    """One MLflow run, opened once per start of the driver and continued by the next start.

    Every event goes to the journal in the run folder; a thread sends the journal. So nothing here
    waits for the network except ``open``, ``close`` and ``upload``, each for ``patience`` seconds
    at most. A server that is away costs nothing but its charts, until it is back.

    Attributes:
        strict: Whether an outage is an error.
        patience: The bound, in seconds.
    """

    def __init__(self, folder: Path, uri: str, info: dict[str, Any], *, strict: bool = False):
        """Use ``Tracker.open``."""
        self.folder, self.strict, self.patience = folder, strict, patience()
        self.journal = Journal(folder)
        self._uri, self._info, self._problem = uri, info, ""
        self._sender = RunSender(folder, uri, info, self.journal)
        self._thread = SenderThread(self.journal, self._sender.deliver, self._report)
        self._sender.over = lambda: self._thread.over

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        tracking_uri: str,
        experiment: str,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        strict: bool = False,
    ) -> "Tracker":
        """Continue the run that ``folder/run.json`` names, or begin one.

        A run that is gone, or another server, means a new run, which then gets the whole journal.
        Parameters are fixed when a run begins; later ones are ignored.

        Raises:
            OutageError: MLflow is away, and the tracker is strict.
        """
        uri = resolve_uri(tracking_uri)
        info = load_info(folder, uri, experiment)
        if info["run_id"] is None:
            info |= {"name": name, "params": {key: str(value) for key, value in params.items()}}
        folder.mkdir(parents=True, exist_ok=True)
        tracker = cls(folder, uri, info, strict=strict)
        tracker._sender.save()
        for key, value in {**tags, "status": "running"}.items():
            tracker.journal.tag(key, str(value))
        tracker.journal.note("status", value="RUNNING")
        tracker._start()
        if strict and not tracker._sender.connected:
            error = tracker.outage()
            tracker.close("failed", timeout=0.0)
            raise error
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until a server has the run."""
        return self._sender.run_id

    @property
    def problem(self) -> str:
        """Why nothing can be sent at the moment, without passwords; empty if all is well."""
        return self._problem if self._thread.failures else ""

    @property
    def away(self) -> float:
        """Seconds since MLflow took something last, if an attempt has failed since; else 0."""
        return self._thread.failing

    def outage(self) -> OutageError:
        """Make the error that an outage is to a strict run."""
        why = self.problem or f"no answer within {self.patience:g} s"
        return OutageError(
            f"MLflow at {self._info['tracking_uri']} is away ({why}); what was logged waits in "
            f"{self.journal.path}, and the same command continues (--strict-tracking)"
        )

    def handle(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the loop; kinds that say nothing to MLflow are ignored."""
        kind = event["kind"]
        if kind == "metrics":
            self.journal.append(int(event["step"]), event["values"])
        elif kind == "tag":
            self.journal.tag(str(event["key"]), str(event["value"]))
        elif kind == "warning":
            known = self.journal.tags.get("warnings", "").splitlines()
            self.journal.tag("warnings", "\n".join(dict.fromkeys([*known, str(event["text"])])))
        elif kind == "artifacts":
            folder = Path(event["folder"])
            self._note_artifacts(folder, [path for path in RESULTS if (folder / path).exists()])
        self._thread.wake()

    def upload(
        self, folder: Path, paths: Sequence[str], *, timeout: float | None = None
    ) -> list[str]:
        """Log files and folders under their path in ``folder``; return those that MLflow lacks.

        What exists and could not be sent in ``timeout`` (default: ``patience``) seconds stays in
        the journal, and follows.
        """
        missing = [path for path in paths if not (folder / path).exists()]
        self._note_artifacts(folder, [path for path in paths if path not in missing])
        self._thread.wake()
        deadline = time.monotonic() + (self.patience if timeout is None else timeout)
        while not self.journal.drained and not self.problem and time.monotonic() < deadline:
            time.sleep(0.02)
        late = {row.get("path") for row, _ in self.journal.unsent(limit=1_000_000)}
        lost = {*missing, *late, *self._sender.refused}
        return [path for path in paths if path in lost]

    def log_model(
        self,
        exported_module: "nn.Module",
        example_BCHW: "np.ndarray",
        name: str = "model",
        *,
        classifier: "nn.Module | None" = None,
        labels: Sequence[str] = (),
    ) -> bool:
        """Write down a model that torch.export can trace, and send it with the rest.

        Args:
            exported_module: Maps images to one tensor, in eval mode.
            example_BCHW: At least two images, float32: torch.export fixes a batch of one.
            classifier, labels: Of the ``pyfunc`` flavour, see ``write_model``.

        Returns:
            Whether it could be traced.

        Raises:
            ValueError: The example has fewer than two images.
        """
        if len(example_BCHW) < 2:
            raise ValueError(f"example_BCHW needs at least 2 images, got {len(example_BCHW)}")
        try:
            write_model(
                self.folder / name,
                exported_module,
                example_BCHW,
                classifier=classifier,
                labels=labels,
            )
        except Exception as error:  # a model that cannot be logged must not fail a trained run
            LOG.warning("no model logged: %s", self._sender.say(error))
            return False
        self.journal.note("model", path=name)
        self._thread.wake()
        return True

    def close(self, status: str, *, timeout: float | None = None) -> bool:
        """End the run with one of ``STATUSES``; return whether MLflow has everything.

        What is left stays in the journal, for the next ``open`` or ``send_rest``.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        self.journal.tag("status", status)
        self.journal.note("status", value=STATUSES[status])
        return self._finish(timeout)

    def ui_hint(self) -> str:
        """Say in one line how to see the run in MLflow's pages."""
        shown = str(self._info["tracking_uri"])
        if shown.startswith("http"):
            page = f"/#/experiments/{self._info.get('experiment_id')}/runs/{self.run_id}"
            return shown + (page if self.run_id else "")
        if (path := to_path(shown)) is not None:
            here = path.is_relative_to(Path.cwd())
            shown = to_uri(path.relative_to(Path.cwd()) if here else path)
        return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"

    def _start(self) -> None:
        """Begin to send; wait for the run's id, but not for a server that is away."""
        mlflow_client()  # imported here, not at the same time in the thread
        self._thread.start()
        local = to_path(self._uri) is not None
        tries, seconds = (3, max(BUILDING, self.patience)) if local else (1, self.patience)
        deadline = time.monotonic() + seconds
        while not self._sender.connected and time.monotonic() < deadline:
            if self._thread.failures >= tries and not self.strict:
                break  # it may be away for long
            time.sleep(0.02)

    def _finish(self, timeout: float | None) -> bool:
        done = self._thread.finish(self.patience if timeout is None else timeout)
        if not done:
            LOG.warning("MLflow lacks the end of this run: it waits in %s", self.journal.path)
        return done

    def _note_artifacts(self, folder: Path, paths: Sequence[str]) -> None:
        where = os.path.relpath(folder, self.folder)  # survives a move of the storage
        for path in paths:
            self.journal.note("artifact", folder=where, path=path)

    def _report(self, error: Exception) -> None:
        self._problem = self._sender.say(error)
        if self._thread.failures == 1:
            where, journal = self._info["tracking_uri"], self.journal.path
            LOG.warning("MLflow at %s: %s; metrics wait in %s", where, self._problem, journal)


def send_rest(
    folder: Path,
    tracking_uri: str,
    *,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> bool:
    """Send what a closed run still has in its journal; return whether MLflow has everything.

    Args:
        tags: Those of them that the run does not have are added, whatever their values.
    """
    tracker = reopen(folder, tracking_uri)
    if tracker is None:
        return True
    for key, value in (tags or {}).items():
        if key not in tracker.journal.tags:
            tracker.journal.tag(key, value)
    if tracker.journal.drained and tracker.run_id:
        return True
    tracker._start()
    return tracker._finish(timeout)


def end_abandoned(
    folder: Path, tracking_uri: str, status: str, *, timeout: float | None = None
) -> bool:
    """End the run of a process that is gone, unless it has; return whether MLflow has all."""
    tracker = reopen(folder, tracking_uri)
    if tracker is None or tracker.journal.tags.get("status") != "running":
        return send_rest(folder, tracking_uri, timeout=timeout)
    tracker._start()
    return tracker.close(status, timeout=timeout)


def reopen(folder: Path, tracking_uri: str) -> Tracker | None:
    """Open a run of another process without a request to MLflow; None: never tracked."""
    uri = resolve_uri(tracking_uri)
    kept = read_state(folder / "run.json", {"experiment": str}, LOG.warning)
    return Tracker(folder, uri, load_info(folder, uri, kept["experiment"])) if kept else None
