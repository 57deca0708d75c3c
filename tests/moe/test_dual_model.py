"""The dual model against its definition, and as a mixture of pairs of experts.

Shapes: B images, S and R experts of the halves, K classes.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.backbones.dual import DualNetworks
from moe.backbones.mixture import NetworkMixture
from moe.backbones.small import Small
from moe.cost import cost
from moe.dual_model import Dual, blend
from moe.export import exportable
from moe.fold_batchnorm import fold
from moe.network import Network, is_router_parameter
from pipeline.attacks.pgd import PGD
from pipeline.measures.fixed_route import FreeChoice, per_expert
from pipeline.measures.router_and_experts import ExpertAttack
from pipeline.measures.soft_gates import straight_through
from pipeline.optimization.losses import cross_entropy_per_image
from pipeline.seeding import Noise, generator_at
from tests.conftest import settled

HALVES: dict[str, Any] = {
    "hard": NetworkMixture(num_experts=3, ratio=1 / 16, gate="hard", top_k=1),
    "soft": NetworkMixture(num_experts=3, ratio=1 / 16),
    "layered": Small(num_experts=2, ratio=0.125),
    "dense": Small(num_experts=1, ratio=0.125),
}
PAIRS = [("hard", "soft"), ("layered", "hard"), ("dense", "soft"), ("dense", "dense")]


def half(name: str, seed: int) -> Network:
    torch.manual_seed(seed)
    return settled(HALVES[name].build(4, 8), 8).double()


def made(pair: tuple[str, str], **settings: Any) -> Dual:
    return Dual(half(pair[0], 0), half(pair[1], 1), **settings).eval()


def images(count: int = 24) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=generator_at("cpu", "dual")).double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pair", PAIRS)
def test_dual_mixes_probabilities_or_logits(pair: tuple[str, str], alpha: float) -> None:
    model, x_BCHW = made(pair, alpha=alpha), images()
    z_BK = [net(x_BCHW).logits for net in (model.standard, model.robust)]
    mixed_BK = (1 - alpha) * z_BK[0].softmax(1) + alpha * z_BK[1].softmax(1)
    assert_close(model(x_BCHW).logits.exp(), mixed_BK, rtol=0, atol=1e-12)
    model.mix = "logits"
    assert_close(model(x_BCHW).logits, (1 - alpha) * z_BK[0] + alpha * z_BK[1])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixed_probabilities_of_sure_networks_keep_finite_gradients(alpha: float) -> None:
    logits = [torch.tensor([[200.0, -200.0]]), torch.tensor([[-90.0, 90.0]])]
    parts = [z_BK.requires_grad_() for z_BK in logits]
    log_BK = blend(parts[0], parts[1], alpha, "probabilities")
    slopes = torch.autograd.grad(log_BK[0, 0], parts, allow_unused=True, materialize_grads=True)
    assert all(slope.isfinite().all() for slope in slopes)
    assert log_BK.isfinite().all()


@pytest.mark.parametrize("pair", PAIRS)
def test_an_expert_of_a_dual_model_is_a_pair(pair: tuple[str, str]) -> None:
    model, x_BCHW = made(pair, alpha=0.4), images()
    first, second = model.standard(x_BCHW), model.robust(x_BCHW)
    many = model.robust.num_experts
    found = model(x_BCHW)
    assert found.router.shape == (24, model.num_experts)
    assert torch.equal(found.route, first.route * many + second.route)
    assert torch.equal(found.route, found.router.argmax(1))
    gates_BSR = first.router.softmax(1)[:, :, None] * second.router.softmax(1)[:, None, :]
    assert_close(found.router.softmax(1), gates_BSR.flatten(1))
    assert torch.equal(model.router_scores(x_BCHW), found.router)
    for expert in range(model.num_experts):
        route_B = torch.full((24,), expert)
        alone = (
            model.standard.along(x_BCHW, route_B // many),
            model.robust.along(x_BCHW, route_B % many),
        )
        assert_close(model.along(x_BCHW, route_B), model.blend(*alone), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=f"valid are 0 to {model.num_experts - 1}"):
        model.along(x_BCHW, torch.full((24,), model.num_experts))


def test_pairs_of_a_route_come_apart_into_the_decisions_of_each_router() -> None:
    model, x_BCHW = made(("layered", "hard")), images()
    found = model.decisions(model(x_BCHW).route)
    assert found.keys() == {"standard router", "robust router"}
    for side, experts in (("standard", 2), ("robust", 3)):
        route_B, count = found[f"{side} router"]
        assert count == experts
        assert torch.equal(route_B, getattr(model, side)(x_BCHW).route)
    half_routed = made(("dense", "soft"))
    assert half_routed.decisions(half_routed(x_BCHW).route).keys() == {"robust router"}


@pytest.mark.parametrize("pair", PAIRS)
def test_held_routing_is_that_of_other_images_in_both_halves(pair: tuple[str, str]) -> None:
    model, x_BCHW = made(pair), images()
    assert_close(model.held(x_BCHW, model(x_BCHW).router), model(x_BCHW).logits)
    other = model(x_BCHW.flip(0))
    parts = (
        model.standard.held(x_BCHW, model.standard(x_BCHW.flip(0)).router),
        model.robust.held(x_BCHW, model.robust(x_BCHW.flip(0)).router),
    )
    assert_close(model.held(x_BCHW, other.router), model.blend(*parts))
    if pair == ("layered", "hard"):
        assert_close(model.held(x_BCHW, other.router), model.along(x_BCHW, other.route))


def test_held_weights_of_soft_gates_leave_the_router_without_a_gradient() -> None:
    model, x_BCHW = half("soft", 0), images()
    scores_BE = model(x_BCHW).router.detach()
    model.held(x_BCHW, scores_BE).sum().backward()
    assert model.router is not None
    assert all(parameter.grad is None for parameter in model.router.parameters())


def test_attack_on_the_experts_of_a_soft_mixture_holds_all_weights() -> None:
    """Along the best expert alone another function would be attacked."""
    model, x_BCHW = fold(half("soft", 0)), images()
    y_B = model(x_BCHW).logits.argmax(1)
    attack = PGD(eps=0.2, step_size=0.1, steps=1, start="clean")
    found = ExpertAttack(attack=attack)(model, x_BCHW, y_B, Noise(generator_at("cpu", 1)))
    scores_BE, x_adv = model(x_BCHW).router, x_BCHW.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        cross_entropy_per_image(model.held(x_adv, scores_BE), y_B).sum(), x_adv
    )
    want = (x_BCHW + 0.1 * slope.sign()).clamp(0, 1)
    assert_close(found.x_adv, want, rtol=0, atol=1e-12)


def test_no_image_stands_that_some_pair_of_experts_gets_wrong() -> None:
    model, x_BCHW = fold(made(("layered", "hard"))), images(12)
    y_B = model(x_BCHW).logits.argmax(1)
    attack, noise = PGD(eps=0.05, step_size=0.02, steps=3), Noise(generator_at("cpu", 2))
    floor = FreeChoice(attack=attack)(model, x_BCHW, y_B, noise)
    clean = [model.along(x_BCHW, torch.full((12,), e)).argmax(1) == y_B for e in range(6)]
    assert not (floor.correct_B & ~torch.stack(clean).all(0)).any()
    assert per_expert(model, x_BCHW, y_B, attack, noise).shape == (12, 6)


@pytest.mark.parametrize("pair", PAIRS)
def test_folded_and_exported_forms_are_the_same_function(pair: tuple[str, str]) -> None:
    model, x_BCHW = made(pair, alpha=0.7), images()
    wanted = model(x_BCHW).logits
    frozen = fold(model)
    assert isinstance(frozen, Dual)
    assert not frozen.standard.gate_gradient
    assert model.gate_gradient
    assert_close(frozen(x_BCHW).logits, wanted, rtol=0, atol=1e-9)
    graph = torch.export.export(exportable(model), (x_BCHW,))
    assert_close(graph.module()(x_BCHW), wanted, rtol=0, atol=1e-9)


def test_gate_gradient_of_a_copy_leaves_the_model_as_it_was() -> None:
    model = fold(made(("layered", "hard")))
    assert isinstance(model, Dual)
    x_BCHW = images(4).requires_grad_()
    logits_BK = straight_through(model)(x_BCHW)
    assert not model.standard.gate_gradient
    assert not model.robust.gate_gradient
    (through,) = torch.autograd.grad(logits_BK[:, 0].sum(), x_BCHW)
    (true,) = torch.autograd.grad(model(x_BCHW).logits[:, 0].sum(), x_BCHW)
    assert not torch.equal(through, true)


def test_cost_is_that_of_both_halves() -> None:
    model = made(("layered", "hard")).float()
    whole, first, second = (cost(net, 8) for net in (model, model.standard, model.robust))
    assert whole.gmac == pytest.approx(first.gmac + second.gmac)
    assert whole.gmac_router == pytest.approx(first.gmac_router + second.gmac_router)
    assert whole.params == first.params + second.params
    assert whole.params_router == first.params_router + second.params_router


def test_names_tell_the_routers_of_both_halves() -> None:
    model = made(("layered", "hard"))
    found = {name for name, _ in model.named_parameters() if is_router_parameter(name)}
    wanted = {
        f"{side}.router.{name}"
        for side in ("standard", "robust")
        for name, _ in getattr(model, side).router.named_parameters()
    }
    assert found == wanted


def test_each_half_keeps_its_own_normalization() -> None:
    model = made(("dense", "dense"), alpha=0.5, mix="logits")
    other = copy.deepcopy(model)
    other.robust.normalize.mean += 0.2
    x_BCHW = images()
    assert torch.equal(other.standard(x_BCHW).logits, model.standard(x_BCHW).logits)
    assert not torch.equal(other(x_BCHW).logits, model(x_BCHW).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.1}, r"alpha must be from 0 to 1, got 1\.1"),
        ({"alpha": float("nan")}, "alpha must be from 0 to 1, got nan"),
        ({"mix": "both"}, "mix must be probabilities or logits, got 'both'"),
        ({"robust": DualNetworks()}, "robust must be a single network"),
        (
            {"standard": Small(router_scope="per_layer")},
            r"standard\.router_scope must be shared in a dual model, got 'per_layer'",
        ),
    ],
)
def test_setting_out_of_range_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualNetworks(**settings)


def test_half_that_routes_in_every_layer_is_refused() -> None:
    layers = Small(num_experts=2, ratio=0.125, router_scope="per_layer").build(4, 8)
    with pytest.raises(ValueError, match="standard must have one router or none"):
        Dual(layers, half("dense", 0))
