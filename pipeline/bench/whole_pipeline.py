"""What Ray Train, the queue and MLflow cost: an epoch with all of them over one without."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.race import Benchmark, RaceResult, Variant
from pipeline.bench.settings import CLASSES, Settings
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.context import Session
from pipeline.data.splits import hold_out
from pipeline.distributed.driver import fit_on_ray
from pipeline.distributed.worker_group import cause
from pipeline.loop import fit
from pipeline.tracking.database_file import to_uri
from pipeline.tracking.open_run import open_run

BARE, TRACKED = "bare loop", "Ray Train, MLflow"
TARGET = 1.05
VALIDATION, TEST = 0.1, 8  # share and number of images: the epochs are what is timed


def pipeline(settings: Settings) -> Benchmark:
    """Train the same epochs by ``pipeline.loop.fit`` alone, and as ``pipeline.train`` does.

    One worker with one thread in both. An epoch lasts from the end of the one before it to its own
    end, on the worker's clock: updates, validation, checkpoint, report and metrics. Start-up and
    the first epoch are thus left out, and so is the end, where the test images are attacked.
    """
    config = run_config(settings)

    def bare() -> list[float]:
        threads, ends = torch.get_num_threads(), Ends()
        torch.set_num_threads(1)  # as a Ray worker has
        try:
            with tempfile.TemporaryDirectory() as scratch:
                place = Session(device=torch.device(settings.device), emit=ends.handle)
                fit(config, Path(scratch), place)
        finally:
            torch.set_num_threads(threads)
        return ends.epochs()

    def tracked() -> list[float]:
        ends = Ends()
        with tempfile.TemporaryDirectory() as scratch:
            home = Path(scratch) / "run"
            home.mkdir()
            kept = override(config, {"tracking_uri": to_uri(Path(scratch) / "mlflow.db")})
            tracker = open_run(kept, home, {})
            try:
                ending = fit_on_ray(kept, home, tracker, ends)
            except Exception as error:
                raise RuntimeError(cause(error)) from error
            if not tracker.close("finished") or "metrics" not in ending:
                raise RuntimeError(f"the run did not end well: {ending.get('text', 'no MLflow')}")
        return ends.epochs()

    def compare(outcome: RaceResult) -> list[str]:
        ratio = outcome.speedup(BARE, TRACKED)
        return [f"an epoch costs {ratio:.3f} of the bare loop's (target: at most {TARGET})"]

    return Benchmark(
        title=f"an epoch of {settings.updates} updates on {settings.batch} images, one worker, one "
        f"thread; {settings.epochs} epochs a turn, the first not counted",
        variants={BARE: itself(bare), TRACKED: itself(tracked)},
        notes=list,
        compare=compare,
    )


class Ends(Follower):
    """Follows a run in silence, and keeps the times at which its epochs ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def handle(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        if event["kind"] == "epoch":
            self.times.append(float(event["ended"]))

    def epochs(self) -> list[float]:
        """Seconds of each epoch but the first."""
        return [end - begin for begin, end in pairwise(self.times)]


def itself(run: Callable[[], list[float]]) -> Variant:
    """Make a variant that takes its own times."""
    return Variant(run, trial=lambda: None, timed=run)


def run_config(settings: Settings) -> Config:
    """Make the run: AdvMoE on made-up images, as many as the updates take."""
    changes = {
        "dataset": "synthetic",
        "dataset.classes": CLASSES,
        "dataset.size": settings.image_size,
        "dataset.train_images": images_for(settings.batch * settings.updates),
        "dataset.test_images": TEST,
        "dataset.validation": VALIDATION,
        "backbone": settings.backbone,
        "backbone.num_experts": settings.num_experts,
        "backbone.ratio": settings.ratio,
        "backbone.router_scope": settings.router_scope,
        "algorithm": "adv_moe",
        "algorithm.router_loss": settings.router_loss,
        "algorithm.attack.steps": settings.attack_steps,
        "evaluation.steps": 1,
        "batch_size": settings.batch,
        "workers": 1,
        "epochs": settings.epochs,
        "name": "bench pipeline",
    }
    return override(Config(), changes)


def images_for(wanted: int) -> int:
    """Count the images to make so that, without the validation split, so many remain."""
    count = wanted
    while len(hold_out(torch.arange(count) % CLASSES, VALIDATION, 0)[0]) < wanted:
        count += 1
    return count
