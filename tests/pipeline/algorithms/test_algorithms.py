"""Every algorithm moves what it should; AdvMoE against its definition, written out over autograd.

Shapes: B images, L self-routing layers, E experts, K classes, CHW channels and sides.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import ConvNorm, MoEConv2d
from moe.network import Network, is_router_parameter
from pipeline.algorithms import ALGORITHMS
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.attacks.pgd import PGD
from pipeline.optimization.state import TrainState
from pipeline.seeding import Noise, generator_at
from tests.golden.record import FOLDER, UPDATES, curves

RATES = {"experts": 0.05, "router": 0.03}
MOMENTUM, DECAY, EPS, STEP = 0.9, 5e-4, 0.05, 0.02
BOTH_SCOPES = pytest.mark.parametrize("scope", ["shared", "per_layer"])


SINGLE = [name for name in ALGORITHMS if name != "jtdmoe"]
"""Algorithms of one network; that of two has tests of its own."""


def training(model: Network, seed: int = 0) -> TrainState:
    """The state of a run; a dense net gets no optimizer of a router."""
    state = TrainState(model.train(), {}, noise=Noise(generator_at("cpu", seed)))
    state.optimizers = {
        group: torch.optim.SGD(members, lr=rate, momentum=MOMENTUM, weight_decay=DECAY)
        for group, rate in RATES.items()
        if (members := state.parameters(group))
    }
    return state


def batch(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    x_BCHW = torch.rand(count, 3, 8, 8, generator=generator_at("cpu", seed, "batch"))
    return x_BCHW, torch.arange(count) % 4


def snapshot(model: Network, group: str) -> dict[str, Tensor]:
    """Parameters and buffers of a group, by name."""
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if is_router_parameter(name) == (group == "router")
    }


def changed(model: Network, group: str, before: dict[str, Tensor]) -> list[str]:
    after = snapshot(model, group)
    return [name for name in before if not torch.equal(before[name], after[name])]


@BOTH_SCOPES
@pytest.mark.parametrize("name", SINGLE)
def test_one_step_moves_router_experts_and_statistics(
    build: Callable[..., Network], name: str, scope: str
) -> None:
    model = build(ratio=0.125, router_scope=scope)
    before = {group: snapshot(model, group) for group in RATES}
    state = training(model)
    losses = ALGORITHMS[name]().step(state, *batch())
    assert losses
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    assert not any(loss.requires_grad for loss in losses.values())
    state.check(1)
    for group in RATES:
        names = set(changed(model, group, before[group]))
        weights = {key for key in before[group] if key.endswith(("weight", "weight_FCRR"))}
        unmoved = {key for key in weights - names if before[group][key].numel() > 1}
        assert not unmoved, "every weight gets a gradient"
        assert any("running_mean" in key for key in names)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in SINGLE if name not in ("adv_moe", "rt_er")])
def test_dense_net_trains_with_every_algorithm_that_needs_no_second_expert(
    build: Callable[..., Network], name: str
) -> None:
    model = build(ratio=0.125, num_experts=1)
    before = snapshot(model, "experts")
    losses = ALGORITHMS[name]().step(training(model), *batch())
    assert all(loss.isfinite() for loss in losses.values())
    assert changed(model, "experts", before)


def test_adv_moe_refuses_a_dense_net(build: Callable[..., Network]) -> None:
    state = training(build(ratio=0.125, num_experts=1))
    with pytest.raises(ValueError, match="num_experts must be at least 2, got 1"):
        AdvMoE().step(state, *batch())


@BOTH_SCOPES
@pytest.mark.parametrize("router_loss", ["trades", "pseudo_label"])
def test_resting_half_of_adv_moe_does_not_change_by_one_bit(
    build: Callable[..., Network], router_loss: Any, scope: str
) -> None:
    model = build(ratio=0.125, router_scope=scope)
    state, algorithm = training(model), AdvMoE(router_loss=router_loss)
    for half, moving, resting in (
        (algorithm._step_experts, "experts", "router"),
        (algorithm._step_router, "router", "experts"),
    ):
        before = {group: snapshot(model, group) for group in RATES}
        half(state, *batch())
        assert changed(model, resting, before[resting]) == []
        assert changed(model, moving, before[moving])
        assert model.training
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_second_half_of_adv_moe_sees_the_weights_of_the_first_in_bf16_too(
    small: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast keeps its bf16 copies of weights to the end of its block, past an update of them."""
    twin, real = copy.deepcopy(small), AdvMoE._step_router
    with torch.autocast("cpu", torch.bfloat16):
        AdvMoE().step(training(small), *batch())

    def fresh(*given: Any) -> dict[str, Tensor]:
        torch.clear_autocast_cache()
        return real(*given)

    monkeypatch.setattr(AdvMoE, "_step_router", fresh)
    with torch.autocast("cpu", torch.bfloat16):
        AdvMoE().step(training(twin), *batch())
    state, other = small.state_dict(), twin.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_two_minibatches_share_the_images_out(
    small: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    for half in ("_step_experts", "_step_router"):

        def spy(*args: Any, half: str = half) -> dict[str, Tensor]:
            seen.append((half, int(args[2][0, 0, 0, 0])))
            seen.append((half, len(args[2])))
            assert torch.equal(args[2][:, 0, 0, 0].long(), args[3])
            return {}

        monkeypatch.setattr(AdvMoE, half, spy)
    x_BCHW = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    state = training(small)
    AdvMoE(minibatches="two").step(state, x_BCHW, torch.arange(7))
    half, other = "_step_experts", "_step_router"
    assert seen == [(half, 0), (half, 4), (other, 4), (other, 3)], "(first image, and how many)"
    seen.clear()
    AdvMoE(minibatches="one").step(state, x_BCHW, torch.arange(7))
    assert [count for _, count in seen] == [0, 7, 0, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, r"beta must be at least 0, got -1\.0"),
        ({"alpha": float("nan")}, "alpha must be at least 0 and finite, got nan"),
        ({"router_loss": "none"}, "router_loss must be trades or pseudo_label, got 'none'"),
        ({"aim": "dlr"}, "aim must be kl or ce, got 'dlr'"),
        ({"minibatches": "three"}, "minibatches must be one or two, got 'three'"),
    ],
)
def test_setting_of_adv_moe_out_of_range_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvMoE(**settings)


@pytest.mark.parametrize("name", ["trades", "moe_at"])
def test_negative_weight_of_stability_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"beta must be at least 0, got -0\.5"):
        ALGORITHMS[name](beta=-0.5)


# The recipe


def trained(
    model: Network, name: str, labels: Callable[[Tensor], Tensor] = lambda y_B: y_B, **recipe: float
) -> dict[str, Tensor]:
    """Weights after one update of plain SGD at rate 1."""
    state = TrainState(copy.deepcopy(model).train(), {}, noise=Noise(generator_at("cpu", 0)))
    state.optimizers = {
        group: torch.optim.SGD(members, lr=1.0)
        for group in RATES
        if (members := state.parameters(group))
    }
    for setting, value in recipe.items():
        setattr(state, setting, value)
    x_BCHW, y_B = batch()
    ALGORITHMS[name]().step(state, x_BCHW, labels(y_B))
    state.check(1)
    return {key: parameter.detach() for key, parameter in state.model.named_parameters()}


def group_of(weights: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    return {k: w for k, w in weights.items() if is_router_parameter(k) == (group == "router")}


@pytest.mark.parametrize("name", SINGLE)
def test_every_algorithm_perturbs_the_weights_of_both_groups(small: Network, name: str) -> None:
    plain, other = trained(small, name), trained(small, name, awp_gamma=0.02)
    for group in RATES:
        own = group_of(plain, group)
        assert any(not torch.equal(weight, other[key]) for key, weight in own.items()), group
    assert all(weight.isfinite().all() for weight in other.values())


@pytest.mark.parametrize("name", SINGLE)
def test_every_algorithm_smooths_its_labels(small: Network, name: str) -> None:
    plain, other = trained(small, name), trained(small, name, label_smoothing=0.1)
    assert any(not torch.equal(weight, other[key]) for key, weight in plain.items())


@pytest.mark.parametrize("name", SINGLE)
def test_every_algorithm_takes_the_shares_of_mixed_images(small: Network, name: str) -> None:
    plain = trained(small, name)
    whole = trained(small, name, lambda y_B: F.one_hot(y_B, 4).float())
    for key, weight in plain.items():
        torch.testing.assert_close(weight, whole[key], rtol=0, atol=1e-4, msg=key)
    mixed = trained(small, name, lambda y_B: torch.full((len(y_B), 4), 0.25))
    assert any(not torch.equal(weight, mixed[key]) for key, weight in plain.items())


@pytest.mark.parametrize("name", SINGLE)
def test_every_algorithm_clips_each_group_and_keeps_the_direction(
    small: Network, name: str
) -> None:
    start, plain = dict(small.named_parameters()), trained(small, name)
    clipped = trained(small, name, clip_norm=1e-3)
    in_turn = issubclass(ALGORITHMS[name], AdvMoE)  # its router sees other experts
    for group in ["experts"] if in_turn else RATES:
        steps = [
            torch.cat([(now[key] - start[key]).detach().flatten() for key in group_of(now, group)])
            for now in (plain, clipped)
        ]
        assert steps[0].norm() > 0.01
        assert steps[1].norm().item() == pytest.approx(1e-3, rel=1e-2)
        assert torch.cosine_similarity(steps[0], steps[1], 0) > 0.999
    loose = trained(small, name, clip_norm=1e6)
    assert all(torch.equal(weight, loose[key]) for key, weight in plain.items())


def test_pseudo_label_of_a_mixed_image_is_that_of_its_larger_class(small: Network) -> None:
    algorithm, (x_BCHW, y_B) = AdvMoE(router_loss="pseudo_label"), batch()
    shares_BK = 0.6 * F.one_hot(y_B, 4) + 0.4 * F.one_hot((y_B + 1) % 4, 4)
    found = []
    for labels in (y_B, shares_BK):
        state = training(copy.deepcopy(small))
        found.append(algorithm._step_router(state, x_BCHW, labels))
    assert found[0] == found[1]
    state = training(copy.deepcopy(small))
    state.label_smoothing = 0.3
    assert algorithm._step_router(state, x_BCHW, y_B) == found[0], "experts are not classes"


def test_attack_on_cross_entropy_aims_at_labels_that_are_not_smoothed(small: Network) -> None:
    seen = []

    def spy(state: TrainState) -> Any:
        real = state.perturb

        def perturb(*given: Any) -> Tensor:
            seen.append(real(*given))
            return seen[-1]

        return perturb

    for smoothing in (0.0, 0.3):
        state = training(copy.deepcopy(small))
        state.label_smoothing = smoothing
        state.perturb = spy(state)  # type: ignore[method-assign]
        ALGORITHMS["pgd_training"]().step(state, *batch())
    assert torch.equal(*seen)


# AdvMoE, slowly


@dataclass
class Gates:
    """What the slow layers hand on: gates of the network, or the scores of each layer."""

    straight_through: bool
    network_BE: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)

    def of(self, scores_BE: Tensor) -> Tensor:
        """One-hot gates; ``1 + s - s`` is one, with the gradient of s."""
        hot_BE = F.one_hot(scores_BE.argmax(1), scores_BE.shape[1]).to(scores_BE)
        if not self.straight_through:
            return hot_BE
        return hot_BE * (1 + scores_BE - scores_BE.detach())


class SlowConvNorm(nn.Module):
    """``BN(sum_e g_be (W_e conv x_b))``, every expert on every image."""

    def __init__(self, layer: ConvNorm):
        super().__init__()
        conv = layer.conv
        assert isinstance(conv, MoEConv2d)
        self.weights = conv.weight_FCRR
        self.stride, self.padding, self.experts = conv.stride, conv.padding, conv.num_experts
        self.gate, self.norm = conv.gate, layer.norm

    def forward(self, x_BCHW: Tensor, gates: Gates) -> Tensor:
        gates_BE = gates.network_BE
        if self.gate is not None:
            gates.scores.append(self.gate(x_BCHW))
            gates_BE = gates.of(gates.scores[-1])
        assert gates_BE is not None
        outputs = [
            gates_BE[:, expert, None, None, None] * F.conv2d(x_BCHW, weight, None, *self.settings)
            for expert, weight in enumerate(self.weights.chunk(self.experts))
        ]
        normed: Tensor = self.norm(torch.stack(outputs).sum(0))
        return normed

    @property
    def settings(self) -> tuple[int, int]:
        return self.stride, self.padding


class Slow:
    """AdvMoE's alternation as the paper and the class's docstring say it, over plain autograd."""

    def __init__(self, model: Network, algorithm: AdvMoE, seed: int):
        self.net = copy.deepcopy(model).train()
        self.names = {id(p): name for name, p in self.net.named_parameters()}
        self.a, self.random = algorithm, generator_at("cpu", seed)
        self.momentum: dict[str, Tensor] = {}
        self._slow_layers(self.net.body)

    def _slow_layers(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, ConvNorm) and isinstance(child.conv, MoEConv2d):
                setattr(module, name, SlowConvNorm(child))
            else:
                self._slow_layers(child)

    def run(self, x_BCHW: Tensor, *, straight_through: bool) -> tuple[Tensor, Tensor]:
        """Logits (B, K), and scores (B, L, E) with L = 1 where one route serves the network."""
        x_BCHW = (x_BCHW - self.net.normalize.mean) / self.net.normalize.std
        gates = Gates(straight_through)
        if self.net.router is not None:
            gates.scores.append(self.net.router(x_BCHW))
            gates.network_BE = gates.of(gates.scores[0])
        return self.net.body(x_BCHW, gates), torch.stack(gates.scores, 1)

    def attack(self, x_BCHW: Tensor, y_B: Tensor, *, whole: bool) -> Tensor:
        """x' of an attack on the network in eval mode, without the straight-through gradient."""
        self.net.eval()
        with torch.no_grad():
            clean = self.run(x_BCHW, straight_through=False)
        normal_BCHW = torch.randn(x_BCHW.shape, generator=self.random)
        moved = (x_BCHW + 0.001 * normal_BCHW).clamp(0, 1)
        for _ in range(2):
            moved = moved.detach().requires_grad_()
            now = self.run(moved, straight_through=False)
            height = divergence(clean[1], now[1]).mean(1).sum()
            if whole and self.a.aim == "kl":
                height = height + divergence(clean[0], now[0]).sum()
            elif whole:
                height = height + len(y_B) * entropy(now[0], y_B)
            (gradient,) = torch.autograd.grad(height, moved)
            moved = moved.detach() + STEP * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, x_BCHW - EPS), x_BCHW + EPS).clamp(0, 1)
        self.net.train()
        return moved

    def experts(self, x_BCHW: Tensor, y_B: Tensor) -> None:
        """``min over phi of CE + beta KL``, the router in eval mode and without a gradient."""
        moved = self.attack(x_BCHW, y_B, whole=True)
        for gate in self._routers():
            gate.eval()
        clean, other = (self.run(x, straight_through=False) for x in (x_BCHW, moved))
        loss = entropy(clean[0], y_B) + self.a.beta * divergence(clean[0], other[0]).mean()
        self._descend(loss, "experts")

    def router(self, x_BCHW: Tensor, y_B: Tensor) -> None:
        """``min over psi``; the experts normalize by the batch, whose statistics are not kept."""
        moved = self.attack(x_BCHW, y_B, whole=self.a.router_loss == "trades")
        before = {name: b.clone() for name, b in self.net.body.named_buffers()}
        clean, other = (self.run(x, straight_through=True) for x in (x_BCHW, moved))
        if self.a.router_loss == "trades":
            loss = entropy(clean[0], y_B) + self.a.beta * divergence(clean[0], other[0]).mean()
        else:
            home_B = y_B % self.net.num_experts
            layers = range(clean[1].shape[1])
            homed = sum(entropy(clean[1][:, layer], home_B) for layer in layers) / len(layers)
            loss = self.a.alpha * homed + self.a.beta * divergence(clean[1], other[1]).mean()
        self._descend(loss, "router")
        for name, buffer in self.net.body.named_buffers():
            if ".gate." not in name:
                buffer.copy_(before[name])

    def _routers(self) -> list[nn.Module]:
        named = self.net.named_modules()
        return [m for name, m in named if name == "router" or name.endswith(".gate")]

    def _descend(self, loss: Tensor, group: str) -> None:
        """``v <- m v + (g + d w)``, ``w <- w - rate v``."""
        members = [
            p
            for p in self.net.parameters()
            if is_router_parameter(self.names[id(p)]) == (group == "router")
        ]
        grads = torch.autograd.grad(loss, members)
        with torch.no_grad():
            for p, grad in zip(members, grads, strict=True):
                name = self.names[id(p)]
                pull = grad + DECAY * p
                self.momentum[name] = MOMENTUM * self.momentum.get(name, torch.zeros(())) + pull
                p.copy_(p - RATES[group] * self.momentum[name])
        self.net.train()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``sum softmax(p) log(softmax(p) / softmax(q))`` over the last axis."""
    return (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1)


def entropy(z_BK: Tensor, y_B: Tensor) -> Tensor:
    return -z_BK.softmax(1)[torch.arange(len(y_B)), y_B].log().mean()


@BOTH_SCOPES
@pytest.mark.parametrize(
    ("router_loss", "minibatches", "aim"),
    [
        ("trades", "one", "kl"),
        ("pseudo_label", "one", "ce"),
        ("trades", "two", "ce"),
        ("pseudo_label", "two", "kl"),
    ],
)
def test_adv_moe_is_its_slow_definition(
    build: Callable[..., Network], router_loss: Any, minibatches: Any, aim: Any, scope: str
) -> None:
    model = build(ratio=0.0625, num_experts=3, router_scope=scope).double()
    algorithm = AdvMoE(
        beta=2.0,
        alpha=1.5,
        router_loss=router_loss,
        minibatches=minibatches,
        aim=aim,
        attack=PGD(eps=EPS, step_size=STEP, steps=2, start="gaussian"),
    )
    state, slow = training(model, seed=5), Slow(model, algorithm, seed=5)
    for update in range(2):
        x_BCHW, y_B = batch(16, seed=update)
        x_BCHW = x_BCHW.double()
        algorithm.step(state, x_BCHW, y_B)
        cut = 8 if minibatches == "two" else 16
        slow.experts(x_BCHW[:cut], y_B[:cut])
        slow.router(x_BCHW[-cut:], y_B[-cut:])
    wanted = {slow.names[id(p)]: p for p in slow.net.parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-9, msg=name)
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    slow_statistics = [b for b in slow.net.buffers() if b.is_floating_point()]
    assert sorted(b.sum().item() for b in statistics) == pytest.approx(
        sorted(b.sum().item() for b in slow_statistics), abs=1e-9
    )


# Golden curves


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ten_updates_are_those_on_record(name: str) -> None:
    """If the numbers are meant to change: ``python -m tests.golden.record``, and say why."""
    wanted = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    found = curves(name)
    assert found.keys() == wanted.keys()
    assert max(map(len, found.values())) == UPDATES  # some losses are of one stage alone
    for key, losses in found.items():
        assert len(losses) == len(wanted[key])
        assert losses == pytest.approx(wanted[key], rel=2e-3, abs=2e-4), key


def test_nothing_is_on_record_that_is_not_in_the_registry() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(ALGORITHMS)
