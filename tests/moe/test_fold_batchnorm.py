"""The folded copy against the network in eval mode, and the network against itself from before."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe.fold_batchnorm import _fold, fold
from moe.network import Network

NETS = {
    "small": {},
    "small, per layer": {"num_experts": 3, "router_scope": "per_layer"},
    "small, dense": {"num_experts": 1},
    "resnet18": {"backbone": "resnet18", "size": 16},
    "resnet18, per layer": {"backbone": "resnet18", "router_scope": "per_layer"},
    "resnet18 above 64 px": {"backbone": "resnet18", "size": 65},
    "wrn28_10": {"backbone": "wrn28_10"},
    "wrn28_10, per layer": {"backbone": "wrn28_10", "router_scope": "per_layer"},
    "wrn28_10 above 64 px": {"backbone": "wrn28_10", "size": 65},
    "vgg16": {"backbone": "vgg16", "num_experts": 3},
    "densenet": {"backbone": "densenet", "ratio": 0.25},
    "densenet, dense": {"backbone": "densenet", "ratio": 0.25, "num_experts": 1},
    "densenet above 64 px": {"backbone": "densenet", "size": 65},
    "small, silu": {"activation": "silu"},
}


def made(build: Any, name: str) -> Network:
    """Build a thin network whose BatchNorms all differ from the identity."""
    model: Network = build(**{"ratio": 1 / 16, **NETS[name]})
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def images(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    size = NETS[name].get("size", 8)
    return torch.rand(9, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradient(model: Network, x_BCHW: Tensor, route: Tensor | None = None) -> Tensor:
    """Gradient of a fixed function of the logits with respect to the images."""
    x_BCHW = x_BCHW.clone().requires_grad_()
    logits_BK = model(x_BCHW).logits if route is None else model.along(x_BCHW, route)
    weights_BK = torch.randn(logits_BK.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((weights_BK * logits_BK).sum(), x_BCHW)[0]


@pytest.mark.parametrize("name", NETS)
def test_folded_copy_computes_the_same_function(build: Any, name: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        model, x_BCHW = made(build, name).to(dtype), images(name, dtype)
        found, want = fold(model.train())(x_BCHW), model.eval()(x_BCHW)
        assert torch.equal(found.route, want.route)
        assert_close(found.logits, want.logits, rtol=tolerance, atol=tolerance)
        assert_close(found.router, want.router, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETS)
def test_nothing_that_is_folded_is_left(build: Any, name: str) -> None:
    folded = fold(made(build, name))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    kept = [module for module in folded.modules() if not isinstance(module, nn.Identity)]
    assert not any(module.training for module in kept)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["small", "small, per layer", "small, dense"])
def test_original_does_not_change_in_any_bit(build: Any, name: str, training: bool) -> None:
    model = made(build, name).double().train(training)
    model(images(name)).logits.sum().backward()
    first = next(iter(model.parameters())).requires_grad_(False)
    model.body.blocks[0].eval()
    before = copy.deepcopy(model)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    for gate_gradient in (True, False):
        gradient(fold(model, gate_gradient=gate_gradient), images(name))

    assert not first.requires_grad
    assert model.gate_gradient
    for one, other, grad in zip(model.parameters(), before.parameters(), grads, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad
        assert (one.grad is None) == (grad is None)
        assert grad is None or torch.equal(one.grad, grad)  # type: ignore[arg-type]
    for one, other in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(one, other)
    for (key, one), (_, other) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert type(one) is type(other), key
        assert one.training == other.training, key


@pytest.mark.parametrize("name", NETS)
def test_input_gradient_is_that_of_the_network_with_its_gates(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name).double(), images(name)
    found = gradient(fold(model, gate_gradient=True), x_BCHW)
    assert_close(found, gradient(model, x_BCHW), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_input_gradient_is_that_along_the_route_without_the_gates(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name).double(), images(name)
    found = gradient(fold(model), x_BCHW)
    assert_close(found, gradient(model, x_BCHW, model(x_BCHW).route), rtol=1e-9, atol=1e-10)
    with_gates = gradient(model, x_BCHW)
    assert (NETS[name].get("num_experts") == 1) == torch.allclose(found, with_gates)


@pytest.mark.parametrize("name", ["small", "small, per layer"])
def test_scores_keep_their_gradient_without_the_gates(build: Any, name: str) -> None:
    """An attack on the router needs it; ``gate_gradient`` is about the logits."""
    model, x_BCHW = made(build, name).double(), images(name).requires_grad_()
    (found,) = torch.autograd.grad(fold(model)(x_BCHW).router.square().sum(), x_BCHW)
    model.gate_gradient = False
    (want,) = torch.autograd.grad(model(x_BCHW).router.square().sum(), x_BCHW)
    assert want.any()
    assert_close(found, want, rtol=1e-9, atol=1e-10)


def test_folded_copy_follows_a_given_route(build: Any) -> None:
    model, x_BCHW = made(build, "small").double(), images("small")
    route = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1, 1])
    assert_close(fold(model).along(x_BCHW, route), model.along(x_BCHW, route))


@pytest.mark.parametrize("name", ["small", "wrn28_10"])
def test_later_updates_of_the_original_do_not_reach_what_is_folded(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name).double(), images(name)
    folded = fold(model)
    want = folded.along(x_BCHW, torch.zeros(9, dtype=torch.int64))
    norms = [m for m in model.body.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert values is not None
            values.data.mul_(2)
    assert torch.equal(folded.along(x_BCHW, torch.zeros(9, dtype=torch.int64)), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_that_stays_keeps_type_and_layout_and_is_that_of_eval_mode(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    for values in (norm.weight, norm.running_var):
        assert values is not None
        nn.init.uniform_(values, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    x_BCHW = torch.randn(3, 5, 4, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
    found, want = _fold(norm)(x_BCHW), norm.eval()(x_BCHW)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    assert_close(found, want, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad((y * weights).sum(), x_BCHW)[0] for y in (found, want)]
    assert_close(*grads, rtol=tolerance, atol=tolerance)
