"""Trials under Ray Tune: each a function that builds Ray Train's trainer, on the head node."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from pipeline.cli.console import span
from pipeline.config import read
from pipeline.config.overrides import flatten
from pipeline.distributed.worker_group import cause, make_trainer
from pipeline.tune.asha import Halving, Unkept
from pipeline.tune.trial_log import TrialLog, TrialRecord

HEAD = {"node:__internal_head__": 0.001}
"""Resources of a trial's own process: no CPU, which its workers would wait for."""
POLL = 0.3  # seconds between two looks into the queue
Say = Callable[[str], None]


def attempt(config: Mapping[str, Any], *, queue: Any, gpus: bool) -> dict[str, Any]:
    """Train one trial; what its workers report at the end of an epoch goes to Tune.

    An error that would come again is an event, not an exception: Tune would try once more.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    settings = read(config["config"])
    trainer = make_trainer(
        settings,
        Path(config["folder"]),
        queue,
        int(settings.workers),
        gpus=gpus,
        callbacks=[TuneReportCallback()],
        trial=config["trial"],
    )
    trainer.fit()
    return {"ended": True}


class Chooser(Unkept, Searcher):  # type: ignore[misc]
    """Hands Tune the trials of the log."""

    def __init__(self, log: TrialLog, say: Say):
        super().__init__(metric=None, mode=None)
        self.log, self.say = log, say

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's settings."""
        before = len(self.log.entries)
        entry = self.log.next()
        for passed in self.log.entries[before:]:
            if passed.status == "infeasible":
                self.say(f"[{passed.trial}] infeasible: {passed.reason}")
        if entry is None:
            return Searcher.FINISHED
        self.say(f"[{entry.trial}] {words(entry.point)}")
        return trial_settings(self.log, entry)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the log knows."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the log is saved."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the log is read."""


def trial_settings(log: TrialLog, entry: TrialRecord) -> dict[str, Any]:
    """Return the settings of a trial's process."""
    return {
        "trial": entry.trial,
        "config": flatten(log.request.config(entry.trial, entry.point)),
        "folder": str(log.request.trial_folder(entry.trial)),
    }


class Course(Unkept, tune.Callback):  # type: ignore[misc]
    """Follows the trials from Tune's own loop: events to MLflow, ends to the log."""

    def __init__(self, log: TrialLog, queue: Any, say: Say):
        self.log, self.queue, self.say = log, queue, say
        self.endings: dict[str, Mapping[str, Any]] = {}
        self.last = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Poll the event queue every so often."""
        if time.monotonic() - self.last > POLL:
            self.take()

    def take(self) -> None:
        """Handle the events that the workers have sent."""
        for event in ray.get(self.queue.take.remote()):
            self.log.handle(event)
            if event["kind"] in ("finished", "failed"):
                self.endings[event["trial"]] = event
            if event["kind"] in ("epoch", "warning", "resumed"):
                self.say(f"[{event['trial']}] {line(event)}")
        self.last = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the end of a trial."""
        name = str(trial.config["trial"])
        self.take()
        ending = self.endings.get(name, {"kind": "failed", "text": "ended without a result"})
        if name in self.log.halted:
            reason = f"by ASHA after epoch {self.log.halted[name]}"
            self.say_end(self.log.end(name, "stopped", reason))
        elif ending["kind"] == "finished":
            self.say_end(self.log.end(name, "finished"))
        else:
            self.say_end(self.log.end(name, "failed", str(ending["text"])))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the error of a trial."""
        name = str(trial.config["trial"])
        self.take()
        error = trial.get_error()
        self.say_end(self.log.end(name, "failed", cause(error) if error else "unknown"))

    def say_end(self, entry: TrialRecord) -> None:
        """Print the end of a trial."""
        text = entry.reason or reached(entry.metrics)
        self.say(f"[{entry.trial}] {entry.status} after {span(entry.seconds)}: {text}")


def drive(log: TrialLog, slots: int, *, gpus: bool, say: Say) -> None:
    """Run the trials that are left, at most so many at a time, in the Ray that is joined."""
    from pipeline.distributed.events import open_event_queue

    scheduler: Any = FIFOScheduler()
    if log.request.scheduler == "asha":
        scheduler = Halving(log.request, list(log.reports), log.note, log.halt)
    queue = open_event_queue()
    trainable = tune.with_parameters(attempt, queue=queue, gpus=gpus)
    tune.Tuner(
        tune.with_resources(trainable, HEAD),
        tune_config=tune.TuneConfig(
            num_samples=max(1, log.left),
            max_concurrent_trials=slots,
            search_alg=Chooser(log, say),
            scheduler=scheduler,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{int(time.time())}",
            storage_path=str(log.folder / "ray"),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[Course(log, queue, say)],
            verbose=0,
        ),
    ).fit()


def line(event: Mapping[str, Any]) -> str:
    """Say an event in a line."""
    if event["kind"] == "epoch":
        v = event["values"]
        return (
            f"epoch {event['epoch']}/{event['epochs']}  val SA {v['val/sa']:.1%} "
            f"RA {v['val/ra']:.1%}  {v['train/images_per_second']:.0f} images/s"
        )
    if event["kind"] == "resumed":
        return f"continues after epoch {event['epoch']} from {event['checkpoint']}"
    return f"warning: {event['text']}"


def reached(metrics: Mapping[str, float]) -> str:
    """Show what a trial reached on validation images."""
    names = {"val/sa": "SA", "val/ra": "RA", "val/ra_forced": "forced", "val/ra_worst": "worst"}
    shares = [f"{short} {metrics[n]:.1%}" for n, short in names.items() if n in metrics]
    return ", ".join([*shares, f"{metrics['cost/gmac']:.4g} GMAC"])


def words(point: Mapping[str, Any]) -> str:
    """Show a point, with four digits per number."""
    short = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in point.items()}
    return " ".join(f"{key}={value}" for key, value in short.items())
