"""Learning rates of both groups over a run, and what else changes with it."""

import itertools
import math
from typing import Any

import pytest

from moe.dual_model import Dual
from moe.network import Network
from pipeline.config import Config
from pipeline.optim import build_optimizers, rate, set_rates
from pipeline.optimization.state import HALVES, TrainState
from tests.conftest import Build

PEAKS = {"experts": 0.4, "router": 0.02}


def config(**settings: Any) -> Config:
    return Config(epochs=10, lr=PEAKS["experts"], router_lr=PEAKS["router"], **settings)


@pytest.mark.parametrize("group", PEAKS)
@pytest.mark.parametrize("schedule", ["cosine", "cyclic", "triangular", "constant"])
def test_warm_up_rises_to_the_peak_of_the_group_and_the_schedule_goes_on_from_there(
    group: str, schedule: Any
) -> None:
    settings = config(warmup_epochs=2.0, schedule=schedule, router_schedule=schedule)
    rates = [rate(settings, group, epoch) for epoch in (0.0, 0.5, 1.0, 1.5, 2.0)]
    wanted = [share * PEAKS[group] for share in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx(wanted)
    steps = [rate(settings, group, 2 + 0.01 * index) for index in range(801)]
    jumps = [abs(b - a) for a, b in itertools.pairwise(steps)]
    assert max(jumps) < 0.01 * PEAKS[group], "no jump, at the end of the warm-up or later"
    last = {"constant": 1.0, "triangular": 0.8}.get(schedule, 0.0)
    assert steps[-1] == pytest.approx(last * PEAKS[group], abs=1e-9)


@pytest.mark.parametrize("group", PEAKS)
def test_schedules_without_a_warm_up_are_their_formulas(group: str) -> None:
    for epoch in (0.0, 1.0, 4.0, 7.5, 10.0):
        t = epoch / 10
        wanted = {
            "cosine": (1 + math.cos(math.pi * t)) / 2,
            "cyclic": t / 0.4 if t < 0.4 else (1 - t) / 0.6,
            "triangular": 0.5 + 0.5 * (1 - abs(epoch % 10 - 5) / 5),
            "constant": 1.0,
        }
        for name, share in wanted.items():
            settings = config(schedule=name, router_schedule=name)
            assert rate(settings, group, epoch) == pytest.approx(share * PEAKS[group]), name


def test_groups_follow_their_own_schedules(small: Network) -> None:
    settings = config(schedule="constant", router_schedule="cosine", warmup_epochs=1.0)
    state = TrainState(small, {})
    state.optimizers = build_optimizers(settings, state)
    set_rates(settings, state, 5.5)
    found = {group: o.param_groups[0]["lr"] for group, o in state.optimizers.items()}
    assert found == pytest.approx({"experts": 0.4, "router": 0.01})


def test_halves_of_a_dual_model_have_a_rate_for_their_experts_and_one_for_their_router(
    build: Build,
) -> None:
    model = Dual(build(ratio=0.125), build(ratio=0.125, num_experts=1))
    state = TrainState(model, {}, partition=HALVES)
    settings = config(schedule="constant", router_schedule="cosine")
    state.optimizers = build_optimizers(settings, state)
    set_rates(settings, state, 5.0)
    sets = {
        (group, settings["part"]): (settings["lr"], {id(p) for p in settings["params"]})
        for group, optimizer in state.optimizers.items()
        for settings in optimizer.param_groups
    }
    rates = {place: rate for place, (rate, _) in sets.items()}
    assert rates == pytest.approx(
        {("standard", "experts"): 0.4, ("standard", "router"): 0.01, ("robust", "experts"): 0.4}
    )
    everything = [id(p) for p in model.parameters()]
    assert sorted(everything) == sorted(place for _, own in sets.values() for place in own)
    router = model.standard.router
    assert router is not None
    assert sets["standard", "router"][1] == {id(p) for p in router.parameters()}


def test_router_without_a_rate_of_its_own_takes_that_of_the_experts() -> None:
    assert rate(Config(lr=0.3), "router", 0.0) == rate(Config(lr=0.3), "experts", 0.0) == 0.3


def test_weight_perturbation_begins_after_its_warm_up(small: Network) -> None:
    state = TrainState(small, {})
    found = []
    for epoch in (0.0, 1.49, 1.5, 9.0):
        set_rates(config(awp_gamma=0.01, awp_warmup=1.5), state, epoch)
        found.append(state.awp_gamma)
    assert found == [0.0, 0.0, 0.01, 0.01]
    set_rates(config(), state, 9.0)
    assert state.awp_gamma == 0
