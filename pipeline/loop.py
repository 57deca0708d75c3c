"""The one training loop: every algorithm, with or without Ray, on one worker or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.routing_stats import load
from pipeline import checkpoint
from pipeline.algorithms import selects
from pipeline.algorithms.renamed_losses import with_current_names
from pipeline.algorithms.staged import Staged
from pipeline.config import Config
from pipeline.context import Session, Signal
from pipeline.data.augmentation import Augmentation, augment, to_float
from pipeline.data.base import class_groups
from pipeline.data.identity import check_same_data
from pipeline.data.splits import Share, Splits
from pipeline.end_of_run import finish
from pipeline.measures import MEASURES
from pipeline.measures.runner import judge
from pipeline.optim import advance, begin, build_optimizers, moment, set_rates
from pipeline.optimization.ema import WeightAverage
from pipeline.optimization.state import NonFiniteError, TrainState, partition_of
from pipeline.seeding import Noise, generator_at, seed_of

KEEP = 2  # newest checkpoints kept beside the best one
GATE_STEPS = 3  # updates after which a router without a gradient is an error
COLLAPSED = (
    0.95  # load of one expert on validation images from which the router counts as collapsed
)


Ending = Callable[[Config, Path, Session, Splits, Sequence[Mapping[str, Any]]], dict[str, float]]
"""What becomes of a model that is trained: ``final.finish``, or ``tryout.tryout``."""


class RouterError(RuntimeError):
    """The router gets no gradient."""


class RoomError(RuntimeError):
    """A batch does not fit into memory."""


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and has made a checkpoint."""


@dataclass
class Progress:
    """How far a run is, and what it measured so far: what a checkpoint keeps beside tensors."""

    epoch: int = 0
    step: int = 0  # of the epoch
    best: float = -1.0  # of the stage
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)  # losses over the epoch's updates so far
    stage: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # sha256 and class_names of the data set

    def record(self, session: Session, step: int, values: dict[str, float]) -> None:
        """Keep metrics of an update and send them on."""
        self.history.append({"step": step, "values": values})
        session.tell("metrics", step=step, values=values)


def fit(
    config: Config,
    folder: Path,
    session: Session = Session(),  # noqa: B008
    ending: Ending = finish,
) -> dict[str, float]:
    """Train, select and judge a model; continue where the folder's newest checkpoint ends.

    Works without Ray and MLflow. On one CPU worker a run that was interrupted ends with the same
    weights as one that was not, bit for bit.

    Args:
        folder: The run folder: receives ``checkpoints/``, ``plots/`` and ``card.md``.
        session: Where this worker runs; the default is alone in one process.
        ending: Judges the best model; the default does so on the test split.

    Returns:
        The metrics that ``ending`` finds, by name; by default those of the test split and the cost.

    Raises:
        NonFiniteError: A loss, gradient, score or adversarial image is not finite.
        RouterError: The router gets no gradient in the first updates.
        RoomError: A batch does not fit into memory.
        CheckpointError: No checkpoint is whole, or one cannot be written.
        Stopped: The session was asked to stop.
    """
    if session.world not in config.worker_counts:
        raise ValueError(f"workers must be {session.world}, as started, got {config.workers}")
    splits = config.dataset.load(config.seed)
    if len(splits.train) < config.batch_size:
        raise ValueError(
            f"batch_size must be at most the {len(splits.train)} training images, "
            f"got {config.batch_size}"
        )
    torch.manual_seed(seed_of(config.seed, "weights") % 2**63)
    state = TrainState(
        checkpoint.build_model(config, 0).to(session.device),
        {},
        session.average,
        ema=WeightAverage(config.ema_decay),
        label_smoothing=config.label_smoothing,
        clip_norm=config.clip_norm,
        partition=partition_of(config.algorithm),
        norm_bound=config.norm_bound,
        class_groups=class_groups(config.dataset),
    )
    state.optimizers = build_optimizers(config, state)
    data = {"sha256": splits.sha256, "class_names": list(splits.class_names)}
    progress = resume(config, folder, session, state, data)
    while progress.epoch < config.epochs:
        train_epoch(config, folder, session, state, splits, progress)
    return ending(config, folder, session, splits, progress.history)


def resume(
    config: Config, folder: Path, session: Session, state: TrainState, data: dict[str, Any]
) -> Progress:
    """Load the newest whole checkpoint, if there is one, and say which were passed over.

    Raises:
        OtherDataError: It was trained on other data than ``data``.
        CheckpointError: There are checkpoints, and none is whole.
    """
    found, passed = checkpoint.newest(folder / "checkpoints")
    for text in passed:
        session.tell("warning", text=f"{text}; the one before it is used")
    if found is None:
        if passed:
            raise checkpoint.CheckpointError(f"{passed[0]}, and none before it is whole")
        progress, change = Progress(data=data), checkpoint.start(config, state.model)
        if change is not None:
            progress.record(session, 0, {"upcycle/relative_change": change})
            session.tell("note", text=f"upcycled: logits change by {change:.2g} of their norm")
        return progress
    saved, meta = checkpoint.load_state(found), checkpoint.verify(found)
    check_same_data(f"checkpoint {found}", meta.get("data", {}).get("sha256"), data["sha256"])
    if stage := meta.get("stage", 0):
        begin(config, state, stage)
    checkpoint.load_weights(found, state.model)
    state.ema.restore(saved, state.model)
    for group, optimizer in state.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][group])
    history = [row | {"values": with_current_names(row["values"])} for row in meta["history"]]
    sums = with_current_names(meta["sums"])
    progress = Progress(meta["epoch"], meta["step"], meta["best"], history, sums)
    progress.stage, progress.data = meta.get("stage", 0), data
    session.tell("resumed", epoch=progress.epoch, step=progress.step, checkpoint=found.name)
    for row in progress.history:  # whoever follows has them already, unless it was lost with us
        session.tell("metrics", **row)
    return progress


class Batch(NamedTuple):
    """This worker's part of an update's images.

    Attributes:
        step: Of the epoch, from 0.
        x_BCHW: Pixels in [0, 1], in channels-last layout.
        y_B: Labels (B,), or shares of classes (B, K) where images are mixed.
        draws: Generator of the update's further random numbers.
    """

    step: int
    x_BCHW: Tensor
    y_B: Tensor
    draws: torch.Generator


class Meter:
    """Sums of losses and the pace of an epoch's updates."""

    def __init__(self, session: Session, batch_size: int, sums: Mapping[str, float]) -> None:
        self.session, self.batch_size = session, batch_size
        self.began, self.seen = time.monotonic(), 0
        self.sums = {n: torch.tensor(total, device=session.device) for n, total in sums.items()}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count an update."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.float()
        self.seen += self.batch_size

    @property
    def pace(self) -> float:
        """Images per second over all workers."""
        return self.seen / (time.monotonic() - self.began)

    def totals(self) -> dict[str, float]:
        """Read the sums, averaged over the workers."""
        return averaged(self.session, self.sums)


def train_epoch(
    config: Config,
    folder: Path,
    session: Session,
    state: TrainState,
    splits: Splits,
    progress: Progress,
) -> None:
    """Train to the end of the current epoch, validate, save, and advance ``progress``."""
    steps = len(splits.train) // config.batch_size
    meter = Meter(session, config.batch_size, progress.sums)
    for batch in batches(config, session, splits, progress.epoch, progress.step):
        update = progress.epoch * steps + batch.step + 1
        prepare(config, state, progress, batch.step, steps)
        losses, watched = train_batch(config, session, state, batch, update)
        meter.add(losses)
        progress.step = batch.step + 1
        tell_progress(config, session, progress, steps, meter.pace, watched)
        last = progress.step == steps
        due = config.checkpoint_steps and update % config.checkpoint_steps == 0 and not last
        signal = follow(session)
        if due or signal >= Signal.SAVE:
            progress.sums = meter.totals()
            save(config, folder, session, state, progress, update)
        if signal is Signal.STOP:
            raise Stopped(f"stopped after epoch {progress.epoch}, update {progress.step}")
    end_epoch(config, folder, session, state, splits, progress, meter)


def prepare(config: Config, state: TrainState, progress: Progress, step: int, steps: int) -> None:
    """Bring network and learning rates to where the schedule wants them at an update."""
    now = moment(config, progress.epoch, step, steps)
    if now.stage != progress.stage:  # selection begins again with the new network
        advance(config, state, now.stage)
        progress.stage, progress.best = now.stage, -1.0
    set_rates(config, state, now.epoch, now.rate)


def train_batch(
    config: Config, session: Session, state: TrainState, batch: Batch, update: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Run one update; return its losses and the scalars that were watched.

    Raises:
        NonFiniteError: A watched scalar is not finite.
        RouterError: The router gets no gradient.
        RoomError: The batch does not fit into memory.
    """
    state.noise = Noise(batch.draws, session.rank, session.world)
    bf16 = config.precision == "bf16"
    with (
        torch.autocast(session.device.type, torch.bfloat16, enabled=bf16),
        roomy(update, len(batch.x_BCHW)),
    ):
        losses = config.algorithm.step(state, batch.x_BCHW, batch.y_B)
    watched = state.check(update)
    check_gate(update, watched)
    state.ema.follow(state.model)
    return losses, watched


def tell_progress(
    config: Config,
    session: Session,
    progress: Progress,
    steps: int,
    pace: float,
    watched: Mapping[str, float],
) -> None:
    """Send how far the run is; ``pace`` in images per second."""
    left = (config.epochs - progress.epoch) * steps - progress.step
    session.tell(
        "progress",
        epoch=progress.epoch + 1,
        epochs=config.epochs,
        step=progress.step,
        steps=steps,
        images_per_second=pace,
        seconds_left=left * config.batch_size / pace,
        loss=next((v for name, v in watched.items() if name.startswith("loss")), 0.0),
    )


def end_epoch(
    config: Config,
    folder: Path,
    session: Session,
    state: TrainState,
    splits: Splits,
    progress: Progress,
    meter: Meter,
) -> None:
    """Validate, save and report at the end of an epoch."""
    steps = len(splits.train) // config.batch_size
    values = {f"train/loss_{n}": v / steps for n, v in meter.totals().items()}
    values["train/images_per_second"] = meter.pace
    if isinstance(config.algorithm, Staged):
        values["train/stage"] = float(progress.stage)
    values |= validate(config, session, state, splits)
    progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
    update = progress.epoch * steps
    progress.record(session, update, values)
    score = values[selects(config.algorithm)]
    better, progress.best = score > progress.best, max(progress.best, score)
    save(config, folder, session, state, progress, update, best=better)
    session.tell(
        "epoch",
        epoch=progress.epoch,
        epochs=config.epochs,
        values=values,
        seconds=(took := time.monotonic() - meter.began),
        ended=time.monotonic(),
        seconds_left=took * (config.epochs - progress.epoch),
    )
    session.report({"epoch": progress.epoch, **values})


@contextmanager
def roomy(update: int, images: int) -> Iterator[None]:
    """Say what helps when a batch does not fit into memory.

    It is not split for its sake: BatchNorm would see parts of it, and the numbers would be others
    than on a machine with more memory, without a word.

    Raises:
        RoomError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):  # torch's words on a CPU
            raise
        raise RoomError(
            f"update {update}: out of memory with {images} images on a worker; a smaller "
            "batch_size, or more workers, which share it, need less"
        ) from error


def follow(session: Session) -> Signal:
    """Hear what the run was asked for; a node that is about to go asks for a checkpoint."""
    signal = session.asked()
    return Signal.SAVE if signal is Signal.LOOK and session.notice() else signal


def averaged(session: Session, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Read scalars, averaged over the workers."""
    sums_L = torch.stack(list(sums.values()))
    session.average(sums_L)
    return dict(zip(sums, sums_L.tolist(), strict=True))


def batches(
    config: Config, session: Session, splits: Splits, epoch: int, first: int
) -> Iterator[Batch]:
    """Yield this worker's part of each batch of an epoch from update ``first`` on.

    Order, augmentation and attack noise follow from (seed, epoch, update) alone, so a run may
    stop and continue anywhere; they do not depend on the number of workers.
    """
    place = {"rank": session.rank, "world": session.world}
    extra = Augmentation(
        raw=config.augmentation,
        cutmix=config.cutmix,
        num_classes=config.dataset.num_classes,
        seed=config.seed,
        **place,
    )
    share = Share(seed=config.seed, epoch=epoch, first=first, batch_size=config.batch_size, **place)
    parts, device = session.in_step(splits.train.batches(share)), session.device
    for step, (raw_BCHW, label_B) in enumerate(parts, start=first):
        draws = generator_at(device, config.seed, "update", epoch, step)
        pixels_BCHW = extra.before(raw_BCHW, epoch, step)
        x_BCHW = augment(
            to_float(pixels_BCHW.to(device)),
            pad=config.dataset.pad,
            flip=config.dataset.flip,
            generator=draws,
            **place,
        )
        x_BCHW, y_B = extra.after(x_BCHW, label_B.to(device), epoch, step)
        yield Batch(step, x_BCHW.contiguous(memory_format=torch.channels_last), y_B, draws)


def check_gate(update: int, watched: dict[str, float]) -> None:
    """Refuse a router that gets no gradient: it would never train.

    Raises:
        RouterError: At one of the first updates the gradient of the router is exactly zero.
    """
    norms = {k: v for k, v in watched.items() if k.startswith("gradient norm of ")}
    still = [k.split()[-1] for k, v in norms.items() if k.endswith("router") and v == 0.0]
    if update <= GATE_STEPS and still:
        raise RouterError(f"step {update}: the {still[0]} gets no gradient, so it cannot train")


def validate(
    config: Config, session: Session, state: TrainState, splits: Splits
) -> dict[str, float]:
    """Measure SA and RA on the validation split; warn of a collapsed router."""
    attack = config.evaluation.attack(config.evaluation.validation_steps)
    verdicts = judge(
        state.deployed,
        splits.validation,
        {name: MEASURES[kind](attack=attack) for name, kind in (("sa", "sa"), ("ra", "ra_pgd"))},
        seed=seed_of(config.seed, "validation"),
        device=session.device,
        rank=session.rank,
        world=session.world,
        total=session.total,
    )
    values = {f"val/{name}": float(hits.float().mean()) for name, hits in verdicts.correct.items()}
    for name, (route, experts) in state.model.decisions(verdicts.route).items():
        share_E = load(route, experts)
        values["val/max_load"] = max(values.get("val/max_load", 0.0), most := float(share_E.max()))
        if most > COLLAPSED:
            text = (
                f"the {name} sends {most:.1%} of the validation images to expert "
                f"{int(share_E.argmax())}: it has collapsed"
            )
            session.tell("warning", text=text)
            session.tell("tag", key="router_collapsed", value="true")
    return values


def save(
    config: Config,
    folder: Path,
    session: Session,
    state: TrainState,
    progress: Progress,
    update: int,
    best: bool = False,
) -> None:
    """Write a checkpoint on rank 0; if that fails, all workers say so."""
    error = None
    if session.rank == 0:
        try:
            write(config, folder, state, progress, update, best)
            session.kept()
        except ValueError as caught:
            error = caught
    session.share_fate(error)


def write(
    config: Config, folder: Path, state: TrainState, progress: Progress, update: int, best: bool
) -> None:
    """Write a checkpoint to disk; keep the newest two and the best."""
    root = folder / "checkpoints"
    target = root / f"step_{update:08d}"
    tensors = {"optimizers": {g: o.state_dict() for g, o in state.optimizers.items()}}
    tensors |= state.ema.saved(state.model)
    meta = {
        "epoch": progress.epoch,
        "step": progress.step,
        "update": update,
        "best": progress.best,
        "stage": progress.stage,
        "history": progress.history,
        "sums": progress.sums,
        "data": progress.data,
    }
    checkpoint.save(root / "best" if best else target, config, state.deployed, tensors, meta)
    if best:  # written first: a run killed in between repeats the epoch and finds it again
        checkpoint.copy(root / "best", target)
    checkpoint.prune(root, KEEP)


__all__ = ["NonFiniteError", "RoomError", "RouterError", "Stopped", "fit"]
