"""ASHA scheduler that replays the reports of an earlier process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline.tune.sweep_request import SweepRequest

Report = tuple[str, int, float]
"""A trial, how many epochs it has trained, and the watched metric there."""


class Unkept:
    """A part of a sweep that leaves nothing in Tune's snapshots: the log is what is kept.

    It holds threads and open files, which no pickle takes.
    """

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class Halving(Unkept, FIFOScheduler):  # type: ignore[misc]
    """Stops trials that fall behind (asynchronous successive halving, arXiv:1810.05934).

    Decisions are Ray's ``ASHAScheduler``'s, whose trials are named as in the log: Tune names a
    trial again when a sweep goes on, and ASHA would take it for another. Nothing is stopped after
    its last epoch, which would only save the judging of a model that is trained.

    Args:
        before: Reports of an earlier process, in their order.
        note: Called with every report, before it is decided on.
        stop: Called with each trial that is stopped, and after how many epochs; for those that
            were stopped before as well.
    """

    def __init__(
        self,
        request: SweepRequest,
        before: Iterable[Report],
        note: Callable[[Report], None],
        stop: Callable[[str, int], None],
    ):
        super().__init__()
        space, self.epochs = request.space, request.base.epochs
        self.watched, mode = space.watched
        self.note, self.stop = note, stop
        self.inner = ASHAScheduler(
            time_attr="epoch",
            metric=self.watched,
            mode=mode,
            grace_period=space.grace,
            max_t=max(space.grace, self.epochs - 1),
            reduction_factor=space.reduction,
            stop_last_trials=False,
        )
        self.known: set[str] = set()
        for report in before:
            if self.decide(report) == TrialScheduler.STOP:
                self.stop(report[0], report[1])

    def decide(self, report: Report) -> str:
        """Tell whether the trial goes on."""
        name, epoch, value = report
        trial = SimpleNamespace(trial_id=name)
        if name not in self.known:
            self.known.add(name)
            self.inner.on_trial_add(None, trial)
        if epoch >= self.epochs:
            return str(TrialScheduler.CONTINUE)
        result = {"epoch": epoch, self.watched: value}
        return str(self.inner.on_trial_result(None, trial, result))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note a report, and decide."""
        if self.watched not in result or result["epoch"] > self.epochs:
            return str(TrialScheduler.CONTINUE)
        report = (str(trial.config["trial"]), int(result["epoch"]), float(result[self.watched]))
        self.note(report)
        decision = self.decide(report)
        if decision == TrialScheduler.STOP:
            self.stop(report[0], report[1])
        return decision
