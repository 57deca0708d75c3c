"""Surrogate gates against the sums that define them, and what their gradients reach.

Shapes: B images, K classes, E experts, L self-routing layers, CHW channels and sides.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.bench.masked import masked
from pipeline.measures.soft_gates import (
    VARIANTS,
    Surrogate,
    pathways,
    relaxed,
    soft_at,
    soft_backward,
    straight_through,
)

Build = Callable[..., Network]


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def wide(build: Build, scope: str, **settings: Any) -> Network:
    """A network in float64, where sums in another order agree."""
    return build(ratio=0.125, router_scope=scope, **settings).double()


def slope(logits: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    x_BCHW = x_BCHW.clone().requires_grad_()
    return torch.autograd.grad(logits(x_BCHW).square().sum(), x_BCHW)[0]


def test_pathways_are_the_logits_along_each_expert(build: Build) -> None:
    model, x_BCHW = wide(build, "shared", num_experts=3), pictures(7).double()
    every_BEK = pathways(model, x_BCHW)
    for expert in range(3):
        along_BK = model.along(x_BCHW, torch.full((7,), expert))
        torch.testing.assert_close(every_BEK[:, expert], along_BK, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("name", ["hard", "straight_through", "soft_backward"])
def test_hard_variant_computes_the_deployed_logits(build: Build, scope: str, name: str) -> None:
    model, x_BCHW = fold(wide(build, scope)), pictures(9).double()
    torch.testing.assert_close(
        VARIANTS[name](model)(x_BCHW), model(x_BCHW).logits, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_cold_mixture_is_the_deployed_network(build: Build, scope: str) -> None:
    model, x_BCHW = fold(wide(build, scope)), pictures(9).double()
    cold = relaxed(model, soft_at(1e-6))
    torch.testing.assert_close(cold(x_BCHW), model(x_BCHW).logits, rtol=0, atol=1e-8)
    warm = relaxed(model, soft_at(1.0))
    assert (warm(x_BCHW) - model(x_BCHW).logits).abs().max() > 1e-3


def test_mixture_is_the_weighted_sum_of_the_pathways(build: Build) -> None:
    model, x_BCHW = wide(build, "shared", num_experts=3), pictures(5).double()
    weights_BE = (model(x_BCHW).router / 0.1).softmax(1)
    wanted_BK = sum(
        weights_BE[:, e, None] * model.along(x_BCHW, torch.full((5,), e)) for e in range(3)
    )
    found_BK = relaxed(model, soft_at(0.1))(x_BCHW)
    torch.testing.assert_close(found_BK, wanted_BK, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
def test_straight_through_gradient_is_that_of_the_masked_layers(build: Build, scope: str) -> None:
    """The slow twin multiplies by its gates, whose gradient is the released code's."""
    model, x_BCHW = wide(build, scope), pictures(6).double()
    twin, frozen = masked(model), fold(model)
    assert twin.gate_gradient
    found = slope(straight_through(frozen), x_BCHW)
    torch.testing.assert_close(found, slope(lambda x: twin(x).logits, x_BCHW))
    assert not frozen.gate_gradient, "the network itself keeps its true gradient"
    assert not torch.allclose(found, slope(lambda x: frozen(x).logits, x_BCHW))


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("name", ["straight_through", "soft_backward", "soft_1", "soft_0.1"])
def test_gradient_reaches_the_router_which_the_deployed_one_does_not(
    build: Build, scope: str, name: str
) -> None:
    model, x_BCHW = fold(build(ratio=0.125, router_scope=scope)), pictures(6).requires_grad_()
    gates = [p for n, p in model.named_parameters() if n.startswith("router.head") or "gate" in n]
    weights = [p.requires_grad_() for p in gates if p.dim() == 2]
    sums = {v: VARIANTS[v](model)(x_BCHW).square().sum() for v in ("hard", name)}
    none = torch.autograd.grad(sums["hard"], weights, allow_unused=True, materialize_grads=True)
    some = torch.autograd.grad(sums[name], weights, allow_unused=True, materialize_grads=True)
    assert not any(g.any() for g in none)
    assert all(g.any() for g in some)


def test_soft_backward_is_hard_forward_and_a_softmax_backward() -> None:
    scores_BE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights_BE = torch.randn(5, 4, dtype=torch.float64)
    gates_BE = soft_backward(scores_BE)
    hard_BE = torch.nn.functional.one_hot(scores_BE.argmax(1), 4).double()
    torch.testing.assert_close(gates_BE, hard_BE, rtol=0, atol=1e-12)
    found = torch.autograd.grad((gates_BE * weights_BE).sum(), scores_BE)[0]
    wanted = torch.autograd.grad((scores_BE.softmax(1) * weights_BE).sum(), scores_BE)[0]
    torch.testing.assert_close(found, wanted)


def test_relaxation_shares_the_parameters_and_leaves_the_network_as_it_was(build: Build) -> None:
    model, x_BCHW = fold(build(ratio=0.125, router_scope="per_layer")), pictures(4)
    before = model(x_BCHW).logits
    kinds = [type(module) for module in model.modules()]
    relaxed(model, soft_at(1.0))(x_BCHW)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(x_BCHW).logits, before)


def test_dense_net_has_one_variant(build: Build) -> None:
    model, x_BCHW = fold(build(ratio=0.125, num_experts=1)), pictures(4)
    for name in VARIANTS:
        assert torch.equal(VARIANTS[name](model)(x_BCHW), model(x_BCHW).logits)


def test_body_whose_routing_layers_have_no_relaxed_form_is_refused(build: Build) -> None:
    model = fold(build(ratio=0.125, router_scope="per_layer"))
    model.num_layers += 1
    with pytest.raises(ValueError, match="mixture convolutions with a gate"):
        relaxed(model, soft_at(1.0))


@pytest.mark.parametrize("variants", [(), ("soft",), ("hard", "0.1")])
def test_variant_that_is_not_there_is_refused(variants: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="variants must be of hard, straight_through, "):
        Surrogate(variants=variants)
