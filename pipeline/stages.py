"""The stages of a run whose algorithm changes the network on the way."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.algorithms.staged import Stage, Staged
from pipeline.checkpoint import build_model
from pipeline.config import Config
from pipeline.optim import build_optimizers
from pipeline.state import TrainState


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
