"""Train one model: ``python -m pipeline.train [PRESET] [key=value ...]``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.bucket import StoreError
from pipeline.command import ENVIRONMENT, PREEMPTED, fail, main, read_arguments
from pipeline.config import Config, flatten, override
from pipeline.console import Follower
from pipeline.crew import Crew, cause, crowded_out, listening
from pipeline.places import check_lasting, owned, run_folder, set_aside, shown
from pipeline.preflight import preflight
from pipeline.presets import PRESETS, headline, label
from pipeline.stores import restore
from pipeline.tracking import OutageError, Tracker, send_rest, strictly

USAGE = """
usage: python -m pipeline.train [PRESET] [key=value ...] [--fresh] [--strict-tracking] [--list]

Train, select and judge one model on Ray Train, and track it in MLflow. Without a preset:
quickstart. The same command continues a run that did not finish.

  key=value  a dotted setting: epochs=3 algorithm.beta=3 algorithm.attack.eps=4/255
  --fresh    begin anew; what an earlier run of these settings left is kept under another name
  --list     the presets
  --strict-tracking  end with an error when MLflow is away for longer than ROBUST_MOE_TRACKING_WAIT
             seconds (default 20); without it training goes on, and MLflow gets everything later

Settings and their defaults: python -m pipeline.train --list PRESET
"""
FLAGS = ("--fresh", "--strict-tracking", "--list")
POLL = 0.3  # seconds between two looks into the mailbox
CONTINUES = "the same command continues from the last checkpoint"


def run(argv: list[str]) -> int:
    """Read the command line, then train; returns the exit code."""
    given = read_arguments(argv, usage=USAGE, flags=FLAGS)
    if "--list" in given.flags:
        return show_presets(given.names)
    name = given.names[0] if given.names else "quickstart"
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}, only {', '.join(PRESETS)}")
    config = override(PRESETS[name](), given.settings)
    strict = "--strict-tracking" in given.flags
    return train(config, fresh="--fresh" in given.flags, strict=strict)


def show_presets(names: tuple[str, ...]) -> int:
    """Print the presets, or the label and all settings of one."""
    for name in names or PRESETS:
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}, only {', '.join(PRESETS)}")
        text = label(name) if names else headline(name)
        print(f"{name}\n{textwrap.indent(text, '    ')}\n")
        if names:
            print("\n".join(f"    {k}={v}" for k, v in flatten(PRESETS[name]()).items()))
    return 0


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
    """
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
    if (result := folder / "result.json").is_file():
        sent = send_rest(folder, config.tracking_uri)
        if strict and not sent:
            return fail(f"MLflow lacks the end of {config.name}; the same command sends it", 1)
        return show_finished(config, follower, json.loads(result.read_text()))
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
    return follow(config, folder, open_run(config, folder, {**own, **tags}, strict), follower)


def open_run(
    config: Config, folder: Path, tags: Mapping[str, str], strict: bool = False
) -> Tracker:
    """Begin or continue the MLflow run of a folder, with the config as its parameters."""
    return Tracker.open(
        folder,
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        name=config.name,
        params={key: str(value) for key, value in flatten(config).items()},
        tags={"commit": commit(), **tags},
        strict=strict,
    )


def follow(config: Config, folder: Path, tracker: Tracker, follower: Follower) -> int:
    """Run the workers, pass their events on, and end the MLflow run with the right status."""
    ending: dict[str, Any] = {}
    status = "failed"
    try:
        with stoppable(), strictly(tracker):
            ending = fit_on_ray(config, folder, tracker, follower)
        if "metrics" in ending:
            log_model(config, folder, tracker)
            write_result(folder, ending["metrics"], tracker)
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
    from pipeline.worker import open_mailbox

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
        mailbox = open_mailbox()
        with delivering(mailbox, handle):
            Crew(config, folder, mailbox, stop, ending, handle).work()
    return ending


@contextmanager
def ray_cluster(
    config: Config, check: Callable[[Config], None] = preflight, *, dashboard: bool = False
) -> Iterator[None]:
    """Join the cluster of ``RAY_ADDRESS``, or start a Ray of our own that ends with the block.

    Args:
        dashboard: Whether a Ray of our own has one. Train frees the workers of a run that was
            stopped from outside through it.

    Raises:
        ValueError: The run cannot work there, says ``check``.
    """
    import ray
    from ray._private import worker

    keys = [k for k in ENVIRONMENT if k.startswith("RAY_TRAIN")]
    passed = {k: os.environ[k] for k in keys if k in os.environ}
    for key in ("ROBUST_MOE_DATA", "ROBUST_MOE_CACHE"):
        if key in os.environ:
            passed[key] = absolute(os.environ[key])
    passed.setdefault("ROBUST_MOE_DATA", str(Path("data").resolve()))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    passed["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    address = os.environ.get("RAY_ADDRESS") or "local"
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=address,
        runtime_env={"env_vars": passed},
        log_to_driver=False,
        logging_level="ERROR",
        **({"include_dashboard": dashboard} if address == "local" else {}),
    )
    worker._worker_logs_enabled = False  # a lost node's dump, which log_to_driver lets through
    if threading.current_thread() is threading.main_thread() and callable(handler):
        # Ray's own aborts the process 3 s after SIGTERM, whatever it is writing down
        signal.signal(signal.SIGTERM, handler)
    try:
        check(config)
        yield
    finally:
        ray.shutdown()


def absolute(folder: str) -> str:
    """Make a folder's name one that holds in any working directory; a URI does already."""
    return folder if "://" in folder else str(Path(folder).expanduser().resolve())


@contextmanager
def delivering(mailbox: Any, handle: Any) -> Iterator[None]:
    """Hand the mailbox's events on from a thread, to the last one."""
    import ray

    over = threading.Event()

    def deliver() -> None:
        asked, last = None, False
        while not (last and asked is None):
            if asked is None:
                last, asked = over.is_set(), mailbox.take.remote()
            try:
                events = ray.get(asked, timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue  # a machine with too much to do; to ask anew would lose this answer
            except Exception:
                return  # the cluster is gone, and the run ends with the error that says why
            asked = None
            for event in events:
                handle(event)
            over.wait(POLL)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=300)


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def log_model(config: Config, folder: Path, tracker: Tracker) -> None:
    """Log the best model to MLflow in its exportable form, with its signature."""
    import torch

    from moe.export import exportable
    from pipeline.checkpoint import load_model

    model = exportable(load_model(folder / "checkpoints" / "best"))
    size = config.dataset.image_size
    generator = torch.Generator().manual_seed(config.seed)
    tracker.log_model(model, torch.rand(4, 3, size, size, generator=generator).numpy())


def write_result(folder: Path, metrics: Mapping[str, float], tracker: Tracker) -> None:
    """Mark a run as finished: the file appears whole, and last."""
    text = json.dumps(
        {"metrics": metrics, "run_id": tracker.run_id, "ui": tracker.ui_hint()}, indent=2
    )
    draft = folder / ".result.json"
    draft.write_text(text + "\n")
    draft.replace(folder / "result.json")


def show_finished(config: Config, follower: Follower, result: Mapping[str, Any]) -> int:
    """Say that a run is finished, and show its table again."""
    follower.results(config.name, result["metrics"])
    follower.say(f"this run is finished (MLflow run {result['run_id']}); --fresh begins it anew")
    follower.say(f"see it with: {result['ui']}")
    return 0


def commit() -> str:
    """Name the commit of the code, with ``-dirty`` where it was changed since."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ROBUST_MOE_COMMIT", "unknown")  # told by pipeline.submit


if __name__ == "__main__":
    sys.exit(main(run))
