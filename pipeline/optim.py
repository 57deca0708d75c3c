"""Optimizers and learning-rate schedules, one of each per parameter group."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from pipeline.algorithms.staged import Stage, Staged
from pipeline.checkpoint import build_model
from pipeline.config import Config
from pipeline.optimization.state import GROUPS, TrainState


def build_optimizers(config: Config, state: TrainState) -> dict[str, Optimizer]:
    """Make an optimizer for each group that has parameters.

    One of a half of a dual model has two sets of parameters, whose rates differ.
    """
    optimizers: dict[str, Optimizer] = {}
    for group in state.partition.names:
        sets: list[dict[str, Any]] = [
            {"params": members, "part": part}
            for part in GROUPS
            if (members := state.parameters(group, part))
        ]
        if not sets:
            continue
        rate = peak(config, group)
        if config.optimizer == "adam":
            optimizers[group] = torch.optim.Adam(sets, lr=rate, weight_decay=config.weight_decay)
        else:
            optimizers[group] = torch.optim.SGD(
                sets, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay
            )
    return optimizers


def peak(config: Config, group: str) -> float:
    """Peak rate of a group."""
    if group == "router" and config.router_lr is not None:
        return config.router_lr
    return config.lr


def rate(config: Config, group: str, epoch: float) -> float:
    """Learning rate of a group at a point of the run, in epochs from its start.

    ``cosine``: ``peak (1 + cos(pi t)) / 2``; ``cyclic``: linear to the peak at t = 2/5, then linear
    to zero (Wong et al., ICLR 2020, arXiv:2001.03994); t runs from 0 to 1 after the warm-up. A
    warm-up takes the place of the cycle's own rise, which would begin at zero again.
    ``triangular``: from half the peak to the peak in five epochs, and back, again and again (the
    released code of RT-ER, arXiv:2502.06832: between 5e-5 and 1e-4, 500 updates each way).
    """
    top = peak(config, group)
    if epoch < config.warmup_epochs:
        return top * epoch / config.warmup_epochs
    t = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    schedule = config.router_schedule if group == "router" else config.schedule
    if schedule == "cosine":
        return top * (1 + math.cos(math.pi * t)) / 2
    if schedule == "triangular":
        turn = epoch - config.warmup_epochs + (5 if config.warmup_epochs else 0)
        return top * (1 - abs(turn % 10 - 5) / 10)
    if schedule == "cyclic" and config.warmup_epochs:
        return top * (1 - t)
    if schedule == "cyclic":
        return top * (t / 0.4 if t < 0.4 else (1 - t) / 0.6)
    return top


def set_rates(config: Config, state: TrainState, epoch: float, factor: float = 1.0) -> None:
    """Set what changes over a run for the next update: AWP's size, the rates, times a factor."""
    state.awp_gamma = config.awp_gamma if epoch >= config.awp_warmup else 0.0
    for group, optimizer in state.optimizers.items():
        for settings in optimizer.param_groups:
            settings["lr"] = factor * rate(config, settings.get("part", group), epoch)


class Moment(NamedTuple):
    """Where an update stands.

    Attributes:
        stage: 0 where the algorithm has no stages.
        epoch: The schedule's time in epochs. Every stage runs the whole schedule, warm-up included,
            in its share of the time.
        rate: Factor on the learning rates.
    """

    stage: int
    epoch: float
    rate: float


def moment(config: Config, epoch: int, step: int, steps: int) -> Moment:
    """Tell the stage of an update, and how far in it the run is.

    Raises:
        ValueError: The run has fewer updates than stages.
    """
    if not isinstance(config.algorithm, Staged):
        return Moment(0, epoch + step / steps, 1.0)
    stages = config.algorithm.stages()
    first = starts(stages, config.epochs * steps)
    update = epoch * steps + step
    stage = max(number for number, start in enumerate(first[:-1]) if start <= update)
    done = (update - first[stage]) / (first[stage + 1] - first[stage])
    return Moment(stage, config.epochs * done, stages[stage].rate)


def starts(stages: tuple[Stage, ...], updates: int) -> list[int]:
    """First update of each stage, and the number of all updates; every stage gets one or more."""
    if updates < len(stages):
        raise ValueError(
            f"epochs must be enough for {len(stages)} updates, one for each stage of the "
            f"algorithm, got {updates}"
        )
    first, before = [0], 0.0
    for number, stage in enumerate(stages[:-1], start=1):
        before += stage.share
        latest = updates - (len(stages) - number)
        first.append(min(max(round(before * updates), first[-1] + 1), latest))
    return [*first, updates]


def begin(config: Config, state: TrainState, stage: int) -> None:
    """Give the state the network of a stage, where and as precise as its own, and optimizers."""
    like = next(state.model.parameters())
    state.model = build_model(config, stage).to(like.device, like.dtype)
    state.optimizers = build_optimizers(config, state)


def advance(config: Config, state: TrainState, stage: int) -> None:
    """Go on to the next stage, whose network takes over from the one before."""
    assert isinstance(config.algorithm, Staged)
    old = state.model
    begin(config, state, stage)
    config.algorithm.hand_over(stage, old, state.model)
