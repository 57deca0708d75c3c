"""Driver of a training run: MLflow run, Ray workers, result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cli.arguments import PREEMPTED, fail
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.data.identity import check_data_of
from pipeline.distributed.address import check_address
from pipeline.distributed.cluster import ray_cluster, stoppable
from pipeline.distributed.events import delivering
from pipeline.distributed.worker_group import WorkerGroup, cause, crowded_out, listening
from pipeline.storage.object_store import StoreError
from pipeline.storage.run_folder import check_lasting, owned, run_folder, set_aside, shown
from pipeline.storage.sync import restore
from pipeline.tracking import OutageError, Tracker, send_rest, strictly
from pipeline.tracking.open_run import open_run
from pipeline.tracking.state_file import RESULT, read_state

CONTINUES = "the same command continues from the last checkpoint"


def train(
    config: Config,
    *,
    fresh: bool = False,
    follower: Follower | None = None,
    tags: Mapping[str, str] | None = None,
    strict: bool = False,
) -> int:
    """Train a config to its end, or continue it; returns the exit code.

    Args:
        tags: Of the MLflow run, beside those that every run has.
        strict: Whether an outage of MLflow ends the run with an error.

    Raises:
        ValueError: The config cannot be kept or tracked where it wants to be.
        ConnectionError: No Ray is at ``RAY_ADDRESS``.
    """
    check_address()
    check_lasting(config)
    follower, folder = follower or Follower(), run_folder(config)
    with owned(folder, follower.say) as free:
        if not free:
            return fail(f"another process is at {config.name} in {shown(folder)}", 1)
        try:
            return train_alone(config, fresh, follower, tags or {}, strict)
        except OutageError as error:
            return fail(str(error), 1)


def train_alone(
    config: Config, fresh: bool, follower: Follower, tags: Mapping[str, str], strict: bool
) -> int:
    """Train in a run folder that nobody else uses; returns the exit code.

    Raises:
        OutageError: MLflow is away, and the run is strict.
    """
    folder = run_folder(config)
    if fresh and (old := set_aside(folder)):
        follower.say(f"the earlier run is kept in {shown(old)}")
    result = read_state(folder / "result.json", RESULT, follower.say)
    if result is not None:
        what = f"{config.name}, which is finished,"
        check_data_of(what, result.get("dataset_sha256"), config.dataset, follower.say)
        sent = send_rest(folder, config.tracking_uri)
        if strict and not sent:
            return fail(f"MLflow lacks the end of {config.name}; the same command sends it", 1)
        return show_finished(config, follower, result)
    try:
        splits = config.dataset.load(config.seed)  # bad data ends the run before Ray starts
    except ValueError as error:
        return fail(str(error), 1)
    folder.mkdir(parents=True, exist_ok=True)
    follower.say(
        f"{config.name}: {len(splits.train)} training, {len(splits.validation)} validation, "
        f"{len(splits.test)} test images; {config.workers} worker(s); run folder {shown(folder)}"
    )
    own = {
        "fingerprint": config.fingerprint,
        "dataset_sha256": splits.sha256,
        "run_folder": str(folder),
    }
    tracker = open_run(config, folder, {**own, **tags}, strict)
    return follow(config, folder, tracker, follower, splits.sha256)


def follow(config: Config, folder: Path, tracker: Tracker, follower: Follower, sha256: str) -> int:
    """Run the workers, pass their events on, and end the MLflow run with the right status."""
    ending: dict[str, Any] = {}
    status = "failed"
    try:
        with stoppable(), strictly(tracker):
            ending = fit_on_ray(config, folder, tracker, follower)
        if "metrics" in ending:
            log_model(config, folder, tracker)
            write_result(folder, ending["metrics"], tracker, sha256)
            status = "finished"
    except (KeyboardInterrupt, SystemExit):
        status = "preempted"
        ending = {"text": f"stopped; {CONTINUES}"}
    except Exception as error:
        ending = {"text": cause(error)}
        if crowded_out(error):
            status = "preempted"
            ending = {"text": f"no room for workers={config.workers} is left; {CONTINUES}"}
    finally:
        follower.close()
        sent = tracker.close(status)
    if not sent:
        follower.say("warning: MLflow does not have everything yet; the same command sends it")
    if status != "finished":
        text = ending.get("text", "the workers ended without a result")
        return fail(text, PREEMPTED if status == "preempted" else 1)
    if tracker.strict and not sent:
        return fail(str(tracker.outage()), 1)
    follower.results(config.name, ending["metrics"])
    follower.say(f"run {tracker.run_id}; run folder {shown(folder)}")
    follower.say(f"see it with: {tracker.ui_hint()}")
    return 0


def fit_on_ray(
    config: Config, folder: Path, tracker: Tracker, follower: Follower
) -> dict[str, Any]:
    """Train on Ray Train; returns how it ended: ``metrics``, or ``text`` of what failed."""
    from pipeline.distributed.events import open_event_queue

    ending: dict[str, Any] = {}

    def handle(event: Mapping[str, Any]) -> None:
        if event["kind"] in ("finished", "failed", "stopped"):
            ending.update(event)
        if event["kind"] == "artifacts":  # which a worker of another node may have written
            try:
                restore(folder, "training")
            except StoreError as error:
                follower.say(f"warning: {error}")
        if event["kind"] == "judging":
            ending["judging"] = True
        if event["kind"] == "progress":
            ending["updates"] = ending.get("updates", 0) + 1
        tracker.handle(event)
        follower.handle(event)

    with ray_cluster(config), listening(follower.say) as stop:
        queue = open_event_queue()
        with delivering(queue, handle):
            WorkerGroup(config, folder, queue, stop, ending, handle).work()
    return ending


def log_model(config: Config, folder: Path, tracker: Tracker) -> None:
    """Log the best model to MLflow in its form for batches, with its signature."""
    import torch

    from moe.sorted_graph import loggable
    from pipeline.checkpoint import class_names_of, load_model

    best = folder / "checkpoints" / "best"
    logits, classifier = loggable(load_model(best))
    size = config.dataset.image_size
    generator = torch.Generator().manual_seed(config.seed)
    example_BCHW = torch.rand(4, 3, size, size, generator=generator).numpy()
    tracker.log_model(logits, example_BCHW, classifier=classifier, labels=class_names_of(best))


def write_result(folder: Path, metrics: Mapping[str, float], tracker: Tracker, sha256: str) -> None:
    """Mark a run as finished: the file appears whole, and last."""
    found = {"metrics": metrics, "run_id": tracker.run_id, "ui": tracker.ui_hint()}
    text = json.dumps({**found, "dataset_sha256": sha256}, indent=2)
    draft = folder / ".result.json"
    draft.write_text(text + "\n")
    draft.replace(folder / "result.json")


def show_finished(config: Config, follower: Follower, result: Mapping[str, Any]) -> int:
    """Say that a run is finished, and show its table again."""
    follower.results(config.name, result["metrics"])
    follower.say(f"this run is finished (MLflow run {result['run_id']}); --fresh starts it over")
    follower.say(f"see it with: {result['ui']}")
    return 0
