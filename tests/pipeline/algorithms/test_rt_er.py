"""RT-ER and JTDMoE against their definitions, written out over plain autograd.

Shapes: B images, E experts, K classes, CHW channels and sides.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.mixture import NetworkMixture
from moe.backbones.small import Small
from moe.dual_model import Dual
from moe.network import Network, is_router_parameter
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.pgd_training import PGDTraining
from pipeline.algorithms.rt_er import RTER, routes
from pipeline.attacks.pgd import PGD
from pipeline.context import Session
from pipeline.loop import RouterError, check_gate
from pipeline.optimization.state import COMPONENTS, HALVES, Partition, TrainState
from pipeline.seeding import Noise, generator_at
from tests.conftest import settled
from tests.helpers.pair import run_pair

EPS, STEP, RATE, BETA = 0.05, 0.02, 0.05, 2.0
ATTACK = PGD(eps=EPS, step_size=STEP, steps=2, start="clean")
GATES = {"hard": {"gate": "hard", "top_k": 1}, "softmax": {"gate": "softmax", "top_k": 2}}


def mixture(gate: str = "hard", seed: int = 0, **settings: Any) -> Network:
    """Three tiny experts, with the statistics of random images."""
    torch.manual_seed(seed)
    backbone = NetworkMixture(num_experts=3, ratio=1 / 16, **{**GATES[gate], **settings})
    return settled(backbone.build(4, 8), 8)


def dual(mix: str = "probabilities", gate: str = "hard") -> Dual:
    return Dual(mixture(gate), mixture(gate, seed=1), alpha=0.6, mix=mix)  # type: ignore[arg-type]


def training(model: Network, partition: Partition = COMPONENTS, rate: float = RATE) -> TrainState:
    state = TrainState(model.train(), {}, noise=Noise(generator_at("cpu", 0)), partition=partition)
    state.optimizers = {
        group: torch.optim.SGD(state.parameters(group), lr=rate) for group in partition.names
    }
    return state


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    x_BCHW = torch.rand(count, 3, 8, 8, generator=generator_at("cpu", "batch"))
    return x_BCHW, torch.arange(count) % 4


def raised(objective: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Two steps of PGD from the clean images."""
    moved = x_BCHW
    for _ in range(2):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(objective(moved), moved)
        moved = (moved + STEP * slope.sign()).clamp(x_BCHW - EPS, x_BCHW + EPS).clamp(0, 1)
    return moved.detach()


def divergence(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    p, q = p_BK.softmax(1), q_BK.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def slow_rt_er(model: Network, x_BCHW: Tensor, y_B: Tensor, robustify: str) -> tuple[Tensor, ...]:
    """Both terms of the loss, each image's expert on its own."""
    deployed = copy.deepcopy(model).eval()
    deployed.gate_gradient = False
    whole = raised(lambda x: F.cross_entropy(deployed(x).logits, y_B, reduction="sum"), x_BCHW)
    ranks_BE = deployed.router_scores(x_BCHW).argsort(1, descending=True)
    chosen = {"second": [ranks_BE[:, 1]], "all": [torch.full_like(y_B, e) for e in range(3)]}
    steady = torch.zeros(())
    robust = F.cross_entropy(model(whole).logits, y_B)
    for expert_B in chosen[robustify]:

        def alone(x: Tensor, to: Tensor = expert_B) -> Tensor:
            rows = [deployed.along(x[b : b + 1], to[b : b + 1]) for b in range(len(x))]
            return F.cross_entropy(torch.cat(rows), y_B, reduction="sum")

        moved = raised(alone, x_BCHW)
        pair = [model.along(images, expert_B) for images in (x_BCHW, moved)]
        steady = steady + divergence(*pair).sum() / len(x_BCHW)
    return robust, steady


def gradients(model: Network, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return dict(zip(names, slopes, strict=True))


def close_step(model: Network, before: Network, slopes: dict[str, Tensor]) -> None:
    """One step of plain SGD along the slopes, and BatchNorm's statistics left to others."""
    for (name, after), old in zip(model.named_parameters(), before.parameters(), strict=True):
        want = old - RATE * slopes.get(name, torch.zeros_like(old))
        torch.testing.assert_close(after, want, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("robustify", ["second", "all"])
@pytest.mark.parametrize("gate", GATES)
def test_rt_er_is_its_slow_definition(gate: str, robustify: Any) -> None:
    model = mixture(gate).double()
    slow = copy.deepcopy(model).train()
    x_BCHW, y_B = batch()
    x_BCHW = x_BCHW.double()
    algorithm = RTER(beta=BETA, robustify=robustify, attack=ATTACK)
    losses = algorithm.step(training(model), x_BCHW, y_B)
    before = copy.deepcopy(slow)
    robust, steady = slow_rt_er(slow, x_BCHW, y_B, robustify)
    torch.testing.assert_close(losses["robust"], robust.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(losses["consistency"], steady.detach(), rtol=0, atol=1e-9)
    assert steady > 0
    close_step(model, before, gradients(slow, robust + BETA * steady))


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_jtdmoe_is_its_slow_definition(mix: str) -> None:
    model = dual(mix, "softmax").double()
    slow = copy.deepcopy(model).train()
    x_BCHW, y_B = batch()
    x_BCHW = x_BCHW.double()
    algorithm = JTDMoE(beta=BETA, robustify="second", attack=ATTACK)
    losses = algorithm.step(training(model, HALVES), x_BCHW, y_B)
    before = copy.deepcopy(slow)
    robust, steady = slow_rt_er(slow.robust, x_BCHW, y_B, "second")
    slopes = gradients(slow, robust + BETA * steady)
    with torch.no_grad():
        for name, weight in slow.robust.named_parameters():
            weight.sub_(RATE * slopes[f"robust.{name}"])
    slow.robust.eval()
    shares = [half(x_BCHW).logits for half in (slow.standard, slow.robust)]
    if mix == "probabilities":
        shares = [z_BK.softmax(1) for z_BK in shares]
    mixed_BK = 0.4 * shares[0] + 0.6 * shares[1].detach()
    log_BK = mixed_BK.log() if mix == "probabilities" else mixed_BK.log_softmax(1)
    natural = -log_BK[torch.arange(len(y_B)), y_B].mean()
    torch.testing.assert_close(losses["natural"], natural.detach(), rtol=0, atol=1e-9)
    assert set(losses) == {"robust", "consistency", "natural"}
    slopes |= {k: v for k, v in gradients(slow, natural).items() if k.startswith("standard.")}
    close_step(model, before, slopes)


def snapshot(model: nn.Module, half: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(f"{half}.")}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name, old in before.items() if not torch.equal(old, now[name])}


@pytest.mark.parametrize("recipe", [{}, {"awp_gamma": 0.02, "clip_norm": 0.1}], ids=["", "recipe"])
@pytest.mark.parametrize("gate", GATES)
def test_resting_half_of_jtdmoe_does_not_change_by_one_bit(gate: str, recipe: Any) -> None:
    model = dual(gate=gate)
    state, algorithm = training(model, HALVES), JTDMoE(attack=ATTACK)
    for setting, value in recipe.items():
        setattr(state, setting, value)
    for step, moving, resting in (
        (algorithm._step_robust, "robust", "standard"),
        (algorithm._step_standard, "standard", "robust"),
    ):
        before = {half: snapshot(model, half) for half in HALVES.names}
        grads = [p.grad for p in state.parameters(resting)]
        step(state, *batch(32))
        assert changed(model, before[resting]) == set()
        assert [p.grad for p in state.parameters(resting)] == grads, "nor does a gradient cross"
        moved = changed(model, before[moving])
        assert any(is_router_parameter(name) for name in moved), "routers move"
        assert any(name.endswith("running_mean") for name in moved), "BatchNorm statistics move"
        weights = {n for n, p in model.named_parameters() if n.startswith(f"{moving}.")}
        assert weights - {n for n in weights if "body" in n} <= moved
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    state.check(1)


@pytest.mark.parametrize("gate", GATES)
def test_rt_er_moves_router_experts_and_statistics(gate: str) -> None:
    model = mixture(gate)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = training(model)
    RTER(attack=ATTACK).step(state, *batch(32))
    moved = changed(model, before)
    assert {name for name, _ in model.named_parameters()} <= moved
    assert any(name.endswith("running_mean") for name in moved)
    assert state.check(1)["gradient norm of router"] > 0


def test_second_expert_is_the_routers_second_choice_everywhere(
    build: Callable[..., Network],
) -> None:
    x_BCHW, _ = batch()
    for scope in ("shared", "per_layer"):
        model = build(ratio=0.125, num_experts=3, router_scope=scope)
        (route,) = routes(model, x_BCHW, "second")
        scores = model(x_BCHW).router
        assert route.shape == scores.shape[:-1]
        above = (scores > scores.gather(-1, route.unsqueeze(-1))).sum(-1)
        assert torch.equal(above, torch.ones_like(above))
        every = routes(model, x_BCHW, "all")
        assert [int(each.unique()) for each in every] == [0, 1, 2]
    assert routes(model, x_BCHW, "none") == []


def test_without_the_experts_term_rt_er_is_adversarial_training() -> None:
    found = []
    for algorithm in (RTER(robustify="none", attack=ATTACK), PGDTraining(attack=ATTACK)):
        model = mixture()
        algorithm.step(training(model), *batch())
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_router_of_a_half_without_a_gradient_is_an_error() -> None:
    watched = {"gradient norm of standard.router": 0.0, "gradient norm of standard": 1.0}
    with pytest.raises(RouterError, match=r"the standard\.router gets no gradient"):
        check_gate(1, watched)
    check_gate(1, {"gradient norm of standard.router": 0.1})


def test_jtdmoe_refuses_a_single_network() -> None:
    with pytest.raises(ValueError, match="jtdmoe needs backbone=dual, got a Mixture"):
        JTDMoE().step(training(mixture()), *batch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, r"beta must be at least 0, got -1\.0"),
        ({"robustify": "third"}, "robustify must be second, all or none, got 'third'"),
    ],
)
@pytest.mark.parametrize("kind", [RTER, JTDMoE])
def test_setting_out_of_range_is_refused(kind: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def one_of_two(rank: int, folder: str) -> None:
    """Train on every other image; rank 1 writes what it ends with, and rank 0 too."""
    model = dual()
    state = training(model, HALVES)
    state.average = Session(rank=rank, world=2).average
    x_BCHW, y_B = batch(32)
    before = snapshot(model, "standard")
    JTDMoE(attack=ATTACK)._step_robust(state, x_BCHW[rank::2], y_B[rank::2])
    assert changed(model, before) == set()
    JTDMoE(attack=ATTACK)._step_standard(state, x_BCHW[rank::2], y_B[rank::2])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_two_workers_end_with_equal_halves(tmp_path: Path) -> None:
    run_pair(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    counts = {name for name in first if "num_batches_tracked" in name}  # of an expert's own images
    assert all(torch.equal(first[name], second[name]) for name in set(first) - counts)


def test_dense_half_has_no_router_to_watch() -> None:
    torch.manual_seed(0)
    dense = settled(Small(num_experts=1, ratio=1 / 16).build(4, 8), 8)
    state = training(Dual(dense, mixture()), HALVES)
    losses = JTDMoE(attack=ATTACK).step(state, *batch())
    assert losses["natural"].isfinite()
    assert "gradient norm of standard.router" not in state.check(1)
