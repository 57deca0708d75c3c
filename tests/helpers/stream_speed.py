"""Two Ray workers on a stream: ``ROBUST_MOE_DATA=... python -m tests.helpers.stream_speed
[key=value]``.

Each image's crop is made a second time, without the stream, and every epoch must consist of these,
each once. Then images/s of the stream alone, of training on batches that are there, and of both,
and the memory of all processes of this Ray after each epoch.
"""

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import loop
from pipeline.checkpoint import build_model
from pipeline.cli.arguments import ENVIRONMENT
from pipeline.config import Config, read
from pipeline.config.overrides import flatten, override
from pipeline.context import Session
from pipeline.data.crops import RandomCrop
from pipeline.data.row_groups import decode_unit
from pipeline.data.splits import Share
from pipeline.data.streaming import Streamed
from pipeline.distributed.cluster import ray_cluster
from pipeline.optim import build_optimizers, set_rates
from pipeline.optimization.state import TrainState

SETTINGS = {
    "dataset": "imagenet",
    "dataset.variant": "imagenette",
    "dataset.image_size": 64,
    "dataset.validation": 0.1,
    "algorithm.router_loss": "pseudo_label",
    "epochs": 2,
    "workers": 2,
    "batch_size": 50,
    "lr": 0.01,
}


def digest(pixels: Any) -> str:
    return hashlib.sha256(bytes(memoryview(pixels).cast("B"))).hexdigest()


def memory() -> float:
    """MiB of all workers and tasks of this Ray, shared pages parted among those that share them."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[1] == str(os.getppid()):
                line = next(x for x in (process / "smaps_rollup").open() if x.startswith("Pss:"))
                total += int(line.split()[1])
        except (OSError, StopIteration, IndexError):
            continue
    return total / 1024


def everyone(value: Any, world: int) -> list[Any]:
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def work(settings: dict[str, Any]) -> None:
    """Measure on one worker; rank 0 writes what all of them found."""
    import ray.train

    torch.set_num_threads(1)
    config, context = read(settings["config"]), ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    session = Session(rank=rank, world=world)
    splits = config.dataset.load(config.seed)
    stream = splits.train
    assert isinstance(stream, Streamed)
    torch.manual_seed(0)
    state = TrainState(build_model(config), {}, session.average)
    state.optimizers = build_optimizers(config, state)
    out: dict[str, list[Any]] = {"alone": [], "both": [], "memory": [], "seen": []}
    took = len(stream) // config.batch_size * config.batch_size
    for epoch in range(config.epochs):
        share = Share(
            seed=config.seed,
            epoch=epoch,
            first=0,
            batch_size=config.batch_size,
            rank=rank,
            world=world,
        )
        seen, began = [], time.monotonic()
        for pixels_BCHW, _ in stream.batches(share):
            seen += [digest(pixels.numpy()) for pixels in pixels_BCHW]
        out["alone"].append(took / (time.monotonic() - began))
        out["memory"].append(memory())
        out["seen"].append(sum(everyone(seen, world), []))  # noqa: RUF017
    kept = next(loop.batches(config, session, splits, 0, 0))
    steps = len(stream) // config.batch_size

    def update(step: int, batch: loop.Batch) -> None:
        set_rates(config, state, step / steps)
        loop.train_batch(config, session, state, batch, step + 1)

    began = time.monotonic()
    for step in range(steps):
        update(step, kept)
    out["training"] = [took / (time.monotonic() - began)]
    for epoch in range(config.epochs):
        began = time.monotonic()
        for batch in loop.batches(config, session, splits, epoch, 0):
            update(batch.step, batch)
        out["both"].append(took / (time.monotonic() - began))
        out["memory"].append(memory())
    if rank == 0:
        torch.save(out, settings["out"])


def run(config: Config) -> dict[str, list[Any]]:
    """Measure on Ray Train; check that every epoch has every image once."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    stream = config.dataset.load(config.seed).train
    assert isinstance(stream, Streamed)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(config):
        TorchTrainer(
            work,
            train_loop_config={"config": flatten(config), "out": f"{folder}/out.pt"},
            scaling_config=ScalingConfig(num_workers=config.workers),
            torch_config=TorchConfig(backend="gloo", timeout_s=300),
            run_config=RunConfig(name="stream", storage_path=folder),
        ).fit()
        out: dict[str, list[Any]] = torch.load(f"{folder}/out.pt", weights_only=True)
    for epoch, seen in enumerate(out["seen"]):
        view = RandomCrop(stream.size, stream.min_area, config.seed, epoch)
        pieces = [decode_unit(unit, stream.layout, view) for unit in stream.units]
        every = {digest(pixels) for piece in pieces for pixels in piece}
        assert len(seen) == len(set(seen)) == len(every) // config.batch_size * config.batch_size
        assert set(seen) <= every
    return out


def main() -> None:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    config = override(Config(), SETTINGS | given)
    out = run(config)
    shown = {name: [round(value, 1) for value in out[name]] for name in out if name != "seen"}
    print(f"every image once in each of {config.epochs} epochs: {len(out['seen'][0])} images")
    print("\n".join(f"{name:9} {values}" for name, values in shown.items()))


if __name__ == "__main__":
    main()
