"""Trials of a sweep, read from MLflow: parent run, objectives, searched keys."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.measures.confidence import wilson
from pipeline.report.grouping import conditions_of
from pipeline.report.statistics import Estimate, estimate
from pipeline.tracking import download, resolve_uri, without_password
from pipeline.tracking.client import active_run
from pipeline.tracking.queries import (
    KIND,
    PARENT,
    Run,
    experiment_of,
    newest,
    reading,
    run_of,
    search,
)

STATUSES = ("finished", "stopped", "failed", "infeasible")
HUGE = 1e300  # MLflow's databases keep infinity as the largest float
SHARES = {
    "sa": "SA",
    "ra": "RA, PGD",
    "ra_forced": "RA, forced route",
    "ra_worst": "RA worst",
}
COSTS = {"cost/gmac": "GMAC", "cost/params": "parameters", "cost/ratio_to_dense": "over dense"}


@dataclass(frozen=True)
class Objective:
    """A metric that a sweep raises (``max``) or lowers (``min``).

    Raises:
        ValueError: Another mode.
    """

    metric: str
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode of {self.metric} must be max or min, got {self.mode!r}")

    @property
    def title(self) -> str:
        """Its name in tables."""
        return title_of(self.metric)

    @property
    def key(self) -> str:
        """Its name on a command line: sa, ra, gmac, ..."""
        name = self.metric.rpartition("/")[2]
        return "ra" if name == "ra_worst" else name

    def score(self, value: float) -> float:
        """Negate a value where lower is better."""
        return value if self.mode == "max" else -value


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Attributes:
        number: As the sweep counts them.
        status: One of ``STATUSES``, or ``running`` without one.
        reason: Why it is infeasible or failed.
    """

    run: Run
    number: str
    status: str
    reason: str = ""

    def value(self, metric: str) -> float | None:
        """Look up a metric; None where there is none, or none that is finite."""
        found = self.run.metrics.get(metric)
        return found if found is not None and is_finite(found) else None

    @property
    def images(self) -> int | None:
        """Number of validation images of its shares; None where it is not known."""
        count = self.value("val/images")
        return int(count) if count else None

    def share(self, metric: str) -> Estimate | None:
        """Look up a share with its 95% interval: the run's own, else Wilson's; None: no share."""
        if (value := self.value(metric)) is None:
            return None
        low, high = self.value(f"{metric}_low"), self.value(f"{metric}_high")
        if low is None or high is None:
            n = self.images
            low = high = math.nan
            if n and 0 <= value <= 1:
                low, high = wilson(round(value * n), n)
        return estimate([value], low, high)


@dataclass(frozen=True)
class Sweep:
    """A parent run, the settings of its search, and its trials in their order.

    Attributes:
        keys: Dotted settings that were searched.
        objectives: Metrics that the sweep itself compared trials by.
        notes: Lines about runs that were left out while reading.
    """

    parent: Run
    space: str
    preset: str
    objectives: tuple[Objective, ...]
    keys: tuple[str, ...]
    split: str
    trials: tuple[Trial, ...]
    tier: str = ""
    notes: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[Objective, ...]:
        """Axes of the front: the objectives if there are several, else SA, RA and GMAC."""
        if len(self.objectives) > 1:
            return self.objectives
        robust = [o.metric for o in self.objectives if o.metric.startswith("val/ra")]
        ra = robust[0] if robust else "val/ra_worst"
        return Objective("val/sa", "max"), Objective(ra, "max"), Objective("cost/gmac", "min")

    def having(self, *statuses: str) -> list[Trial]:
        """Select trials by status."""
        return [trial for trial in self.trials if trial.status in statuses]

    @property
    def counts(self) -> Counter[str]:
        """Number of trials by status."""
        return Counter(trial.status for trial in self.trials)


def is_finite(value: float) -> bool:
    """Tell a number from NaN and from what MLflow keeps for infinity."""
    return math.isfinite(value) and abs(value) < HUGE


def is_share(metric: str) -> bool:
    """Tell a share of images from a cost."""
    return metric.startswith(("val/", "test/"))


def title_of(metric: str) -> str:
    """Name a metric in a table."""
    split, _, name = metric.partition("/")
    if split in ("val", "test") and name in SHARES:
        return SHARES[name] + (" (test)" if split == "test" else "")
    return COSTS.get(metric, metric)


def read_sweep(tracking_uri: str | None, parent: str, experiment: str = "robust-moe") -> Sweep:
    """Read a sweep and its trials.

    Args:
        parent: Run id, or "latest": the newest sweep of the experiment.

    Raises:
        ValueError: There is no such database or run, or it is no sweep.
        ConnectionError: The server does not answer.
    """
    uri = resolve_uri(tracking_uri)
    with reading(uri) as client:
        run, where = find_parent(client, parent, experiment, uri)
        children = search(client, where, f"tags.`{PARENT}` = '{run.run_id}'")
    plan = read_plan(uri, run.run_id, experiment)
    trials, again = once_each(map(trial_of, children))
    return Sweep(
        parent=run,
        space=str(plan.get("space") or run.tags.get("space", "")),
        preset=str(plan.get("preset", "")),
        objectives=tuple(Objective(str(m), str(mode)) for m, mode in plan["objectives"]),
        keys=tuple(map(str, plan["keys"])),
        split=str(plan.get("split", "validation")),
        trials=tuple(trials),
        tier=str(plan.get("tier", "")),
        notes=(f"{again} older run(s) of trials that ran again are left out.",) if again else (),
    )


def find_parent(client: Any, parent: str, experiment: str, uri: str) -> tuple[Run, str]:
    """Find the parent run of a sweep, and the id of its experiment.

    Raises:
        ValueError: There is no such run or experiment, or the run is no sweep.
    """
    shown = without_password(uri)
    if parent != "latest":
        if (record := active_run(client, parent)) is None:
            raise ValueError(f"no run {parent!r} in {shown}")
        if (kind := record.data.tags.get(KIND)) != "sweep":
            raise ValueError(f"run {parent!r} must be a sweep (tag {KIND}), got {kind!r}")
        return run_of(record), str(record.info.experiment_id)
    where = experiment_of(client, experiment, uri)
    if not (found := newest(client, where, f"tags.`{KIND}` = 'sweep'", "start_time")):
        raise ValueError(f"no sweep in experiment {experiment!r} of {shown}")
    return found[0], where


def read_plan(uri: str, run_id: str, experiment: str) -> dict[str, Any]:
    """Read ``sweep.json``, in which the driver writes what it searches."""
    with tempfile.TemporaryDirectory() as folder:
        file = download(uri, run_id, "sweep.json", Path(folder), experiment)
        try:
            plan: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"sweep.json of run {run_id} is not JSON: {error}") from error
    if not isinstance(plan, dict):
        raise ValueError(f"sweep.json of run {run_id} must be an object, got {str(plan)[:80]}")
    missing = [key for key in ("objectives", "keys") if key not in plan]
    if missing:
        raise ValueError(f"sweep.json of run {run_id} lacks {', '.join(missing)}")
    return plan


def trial_of(run: Run) -> Trial:
    """Make a trial of a child run."""
    status = run.tags.get("status", "running")
    return Trial(run, run.tags.get("trial", run.name), status, run.tags.get("reason", ""))


def once_each(trials: Iterable[Trial]) -> tuple[list[Trial], int]:
    """Keep one run of each trial, the finished one or the newest; count the others."""
    every = sorted(trials, key=lambda trial: (trial.status == "finished", trial.run.ended))
    best = {trial.number: trial for trial in every}
    return sorted(best.values(), key=lambda trial: natural(trial.number)), len(every) - len(best)


def natural(number: str) -> tuple[int, str]:
    """Order numbers as numbers, and other names after them."""
    return (int(number), "") if number.isdecimal() else (2**63, number)


def competing(sweep: Sweep) -> tuple[list[Trial], list[str]]:
    """Select the trials that may be compared; give for every other finished one the reason.

    A trial competes if it is finished, has a finite number on every axis, and was evaluated under
    the threat and on the data of most others; settings of the data that the sweep searches may
    differ.
    """
    notes, able = [], []
    for trial in sweep.having("finished"):
        lacking = [axis.metric for axis in sweep.axes if trial.value(axis.metric) is None]
        if lacking:
            said = ", ".join(f"{m} = {trial.run.metrics.get(m, 'missing')}" for m in lacking)
            notes.append(f"Trial {trial.number} is not compared: {said}.")
        else:
            able.append(trial)
    conditions = {trial.number: conditions_but(trial, sweep.keys) for trial in able}
    most = Counter(tuple(sorted(found.items())) for found in conditions.values()).most_common(1)
    usual = dict(most[0][0]) if most else {}
    for trial in list(able):
        own = conditions[trial.number]
        apart = [key for key in {**usual, **own} if own.get(key) != usual.get(key)]
        if apart:
            said = ", ".join(f"{k} {own.get(k)} (others {usual.get(k)})" for k in apart)
            why = f"evaluated under other conditions: {said}"
            notes.append(f"Trial {trial.number} is not compared, {why}.")
            able.remove(trial)
    return able, notes


def conditions_but(trial: Trial, searched: Sequence[str]) -> Mapping[str, str]:
    """Return the settings that must be equal for comparable numbers, less those searched."""
    found = conditions_of(trial.run) | {"dataset": trial.run.params.get("dataset", "")}
    exempt = {key for key in searched if key.startswith("dataset.")}
    return {key: value for key, value in found.items() if key not in exempt}
