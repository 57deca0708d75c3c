"""Weight perturbation: its size and direction, the gradient it leads to, and the way back.

Shapes: B images, CHW channels and sides.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.layers import MoEConv2d
from moe.network import Network, is_router_parameter
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.trades import trades_terms
from pipeline.optimization.awp import perturbed, stacks, still_statistics
from pipeline.optimization.losses import cross_entropy_per_image, kl
from pipeline.optimization.state import GROUPS, TrainState
from pipeline.seeding import Noise, generator_at

GAMMA, RATE = 0.03, 0.1
BOTH_SCOPES = pytest.mark.parametrize("scope", ["shared", "per_layer"])


def training(model: Network, **settings: Any) -> TrainState:
    state = TrainState(model.train(), {}, noise=Noise(generator_at("cpu", 3)), **settings)
    state.optimizers = {
        group: torch.optim.SGD(members, lr=RATE)
        for group in GROUPS
        if (members := state.parameters(group))
    }
    return state


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, images near them, labels."""
    generator = generator_at("cpu", "batch")
    x_BCHW = torch.rand(12, 3, 8, 8, generator=generator)
    x_adv = (x_BCHW + 0.1 * torch.rand(12, 3, 8, 8, generator=generator)).clamp(0, 1)
    return x_BCHW.to(dtype), x_adv.to(dtype), torch.arange(12) % 4


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def layers_of(model: Network, name: str, weight: Tensor) -> tuple[Tensor, ...]:
    """The layers that lie in a weight: a mixture convolution holds one an expert."""
    module = model.get_submodule(name.rpartition(".")[0])
    return weight.chunk(model.num_experts if isinstance(module, MoEConv2d) else 1)


@BOTH_SCOPES
@pytest.mark.parametrize("groups", [("experts",), ("router",), GROUPS])
def test_every_layer_moves_uphill_by_gamma_times_its_length_and_back_to_the_bit(
    build: Callable[..., Network], scope: str, groups: tuple[str, ...]
) -> None:
    model = build(ratio=0.125, num_experts=3, router_scope=scope)
    state, before = training(model), weights(model)
    names = {id(p): name for name, p in model.named_parameters()}
    layers = stacks(model, [p for group in groups for p in state.parameters(group)])
    generator = generator_at("cpu", "slopes")
    slopes = [torch.randn(weight.shape, generator=generator) for weight, _ in layers]
    for slope, (_, count) in zip(slopes, layers, strict=True):
        if count > 1:
            slope.chunk(count)[1].zero_()  # an expert that no image chose
    with perturbed(layers, slopes, GAMMA):
        after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {
        name
        for name, weight in before.items()
        if weight.dim() > 1 and ("router" if is_router_parameter(name) else "experts") in groups
    }
    assert moved == wanted
    for (weight, _), slope in zip(layers, slopes, strict=True):
        name = names[id(weight)]
        parts = [layers_of(model, name, t) for t in (before[name], after[name], slope)]
        for old, new, uphill in zip(*parts, strict=True):
            step = (new - old).double()
            if not uphill.any():
                assert torch.equal(old, new)
                continue
            length = GAMMA * old.double().norm().item()
            assert step.norm().item() == pytest.approx(length, rel=1e-4)
            assert (step * uphill).sum() / (step.norm() * uphill.norm()) > 0.99999
    assert all(torch.equal(before[name], now) for name, now in weights(model).items())


def test_weights_are_back_after_an_error(small: Network) -> None:
    before, layers = weights(small), stacks(small, list(small.parameters()))
    slopes = [torch.ones_like(weight) for weight, _ in layers]

    def fail() -> None:
        with perturbed(layers, slopes, GAMMA):
            assert any(not torch.equal(before[name], now) for name, now in weights(small).items())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert all(torch.equal(before[name], now) for name, now in weights(small).items())


# The update


def slow_gradient(model: Network, loss: Callable[[Network], Tensor], group: str) -> Any:
    """Gradient of a loss at ``w + gamma |w| g / |g|``, layer by layer, on a copy; and the rise."""
    twin = copy.deepcopy(model)
    mine = {
        name: p
        for name, p in twin.named_parameters()
        if group in (("router" if is_router_parameter(name) else "experts"), "both")
    }
    low = loss(twin)
    slopes = torch.autograd.grad(low, list(mine.values()), allow_unused=True)
    for (name, weight), slope in zip(mine.items(), slopes, strict=True):
        if weight.dim() < 2 or slope is None:
            continue
        pairs = zip(layers_of(twin, name, weight), layers_of(twin, name, slope), strict=True)
        moved = [w + GAMMA * w.norm() * g / g.norm() if g.norm() > 0 else w for w, g in pairs]
        weight.data = torch.cat([part.detach() for part in moved])
    high = loss(twin)
    grads = torch.autograd.grad(high, list(mine.values()), allow_unused=True)
    return dict(zip(mine, grads, strict=True)), (high - low).item()


@BOTH_SCOPES
@pytest.mark.parametrize("group", ["experts", "router", "both"])
def test_update_follows_the_gradient_at_the_worst_weights_nearby(
    build: Callable[..., Network], scope: str, group: str
) -> None:
    model = build(ratio=0.125, num_experts=3, router_scope=scope).double()
    state, (x_BCHW, x_adv, y_B) = training(model, awp_gamma=GAMMA), batch(torch.float64)
    before = weights(model)

    def loss(net: Network) -> Tensor:
        clean, moved = net(x_BCHW).logits, net(x_adv).logits
        return cross_entropy_per_image(clean, y_B).mean() + 6.0 * kl(clean, moved)

    wanted, rise = slow_gradient(model, loss, group)
    if (group, scope) == ("experts", "shared"):  # elsewhere a route may change on the way
        assert rise > 0, "the loss is higher there"
    terms = trades_terms(state, x_BCHW, x_adv, y_B)
    groups = GROUPS if group == "both" else (group,)
    state.minimize(terms, {"natural": 1.0, "robust": 6.0}, *groups)
    for name, now in weights(model).items():
        if wanted.get(name) is None:
            assert torch.equal(now, before[name]), name
            continue
        step = before[name] - RATE * wanted[name]
        torch.testing.assert_close(now, step, rtol=0, atol=1e-10, msg=name)


def test_update_differs_from_the_plain_one_but_its_reports_and_statistics_do_not(
    small: Network,
) -> None:
    found = []
    for gamma in (0.0, GAMMA):
        model = copy.deepcopy(small)
        state, (x_BCHW, x_adv, y_B) = training(model, awp_gamma=gamma), batch()
        terms = trades_terms(state, x_BCHW, x_adv, y_B)
        losses = state.minimize(terms, {"natural": 1.0, "robust": 6.0}, "experts")
        found.append((losses, dict(model.named_buffers()), weights(model), state.check(1)))
    (plain, still, own, watched), (losses, statistics, other, perturbed_watched) = found
    assert losses == plain, "the terms are those of the weights that are kept"
    assert not any(loss.requires_grad for loss in losses.values())
    for name, buffer in still.items():
        assert torch.equal(buffer, statistics[name]), f"{name} moved once"
    before = dict(small.named_buffers())
    assert any(not torch.equal(before[name], buffer) for name, buffer in still.items())
    assert any(not torch.equal(own[name], other[name]) for name in own)
    name = "loss of experts"
    assert perturbed_watched[name] > watched[name], "the loss that is watched is the worst one"


@BOTH_SCOPES
@pytest.mark.parametrize("router_loss", ["trades", "pseudo_label"])
def test_resting_half_does_not_change_by_one_bit(
    build: Callable[..., Network], router_loss: Any, scope: str
) -> None:
    model = build(ratio=0.125, router_scope=scope)
    state, algorithm = training(model, awp_gamma=GAMMA), AdvMoE(router_loss=router_loss)
    x_BCHW, _, y_B = batch()
    for half, resting in (
        (algorithm._step_experts, "router"),
        (algorithm._step_router, "experts"),
    ):
        before = copy.deepcopy(model.state_dict())
        half(state, x_BCHW, y_B)
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert not {n for n in changed if is_router_parameter(n) == (resting == "router")}
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(norm.track_running_stats for norm in norms(model))


def test_update_in_bf16_does_not_use_the_copies_that_autocast_keeps(small: Network) -> None:
    """Autocast keeps bf16 copies of weights to the end of its block, past a change of them."""
    found, (x_BCHW, x_adv, y_B) = [], batch()
    for clear in (lambda: None, torch.clear_autocast_cache):
        state = training(copy.deepcopy(small), awp_gamma=GAMMA)
        terms = trades_terms(state, x_BCHW, x_adv, y_B)

        def fresh(clear: Any = clear, terms: Any = terms) -> dict[str, Tensor]:
            clear()
            losses: dict[str, Tensor] = terms()
            return losses

        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):  # the second begins at the weights of the first
                state.minimize(fresh, {"natural": 1.0, "robust": 6.0}, *GROUPS)
        found.append(weights(state.model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_loss_that_reaches_no_weight_is_refused(small: Network) -> None:
    state = training(small, awp_gamma=GAMMA)
    with pytest.raises(ValueError, match="no gradient of the loss reaches router"):
        state.minimize(lambda: {"flat": torch.zeros(())}, {"flat": 1.0}, "router")


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def test_still_statistics_normalize_by_the_batch(small: Network) -> None:
    x_BCHW = batch()[0]
    small.train()
    before = copy.deepcopy(dict(small.named_buffers()))
    with torch.no_grad():
        with still_statistics(small):
            quiet = small(x_BCHW).logits
        assert all(torch.equal(b, before[name]) for name, b in small.named_buffers())
        assert torch.equal(small(x_BCHW).logits, quiet)
    assert any(not torch.equal(b, before[name]) for name, b in small.named_buffers())
