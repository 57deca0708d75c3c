"""Whole networks against their masked twins, against themselves image by image, and on bad routes.

Shapes: B images, E experts, L mixture layers.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import moe.network
from moe.backbones import BACKBONES
from moe.network import Network, is_router_parameter
from moe.routing import Routed
from pipeline.bench.masked import masked

NETS = {
    "small": {"num_experts": 2},
    "small, 4 experts": {"num_experts": 4},
    "small, per layer": {"num_experts": 3, "router_scope": "per_layer"},
    "small, dense": {"num_experts": 1},
    "resnet18 at 8 px": {"backbone": "resnet18", "num_experts": 2},
    "resnet18 at 16 px": {"backbone": "resnet18", "num_experts": 3, "size": 16},
    "resnet18, per layer": {"backbone": "resnet18", "num_experts": 2, "router_scope": "per_layer"},
    "resnet18 above 64 px": {"backbone": "resnet18", "num_experts": 2, "size": 65},
    "resnet18, 16 wide": {"backbone": "resnet18", "num_experts": 2, "width": 16, "ratio": 0.25},
    "wrn28_10": {"backbone": "wrn28_10", "num_experts": 2},
    "wrn28_10, per layer": {"backbone": "wrn28_10", "num_experts": 3, "router_scope": "per_layer"},
    "wrn28_10 above 64 px": {"backbone": "wrn28_10", "num_experts": 2, "size": 65},
    "vgg16": {"backbone": "vgg16", "num_experts": 3, "size": 16},
    "vgg16, per layer": {"backbone": "vgg16", "num_experts": 2, "router_scope": "per_layer"},
    "densenet": {"backbone": "densenet", "num_experts": 2, "ratio": 0.25},
    "densenet, per layer": {
        "backbone": "densenet",
        "num_experts": 2,
        "ratio": 0.25,
        "router_scope": "per_layer",
    },
    "densenet above 64 px": {"backbone": "densenet", "num_experts": 2, "size": 65},
    "small, silu": {"num_experts": 2, "activation": "silu"},
    "small, softplus": {"num_experts": 2, "activation": "softplus"},
}
FEW = (
    "small",
    "small, per layer",
    "small, dense",
    "resnet18 at 8 px",
    "wrn28_10",
    "vgg16, per layer",
    "densenet",
)
BATCH = 9


def made(build: Any, name: str) -> Network:
    """Build a thin network in float64."""
    model: Network = build(**{"ratio": 1 / 16, **NETS[name]}).double()
    return model


def images(name: str, count: int = BATCH) -> Tensor:
    size = NETS[name].get("size", 8)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)


def exact(found: Tensor | None, want: Tensor | None, scale: float = 1.0) -> None:
    """Compare to 1e-10 of the largest number that took part."""
    assert_close(found, want, rtol=1e-9, atol=1e-10 * max(1.0, scale))


def push(found: Routed, x_BCHW: Tensor) -> None:
    """Send random gradients into logits and scores, the same for outputs of the same shapes."""
    generator = torch.Generator().manual_seed(2)
    loss = x_BCHW.new_zeros(())
    for output in (found.logits, found.router):
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output * weights).sum()
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("gate_gradient", [True, False], ids=["gates learn", "gates rest"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_network_equals_its_masked_twin_with_all_gradients(
    build: Any, name: str, training: bool, gate_gradient: bool
) -> None:
    model = made(build, name).train(training)
    model.gate_gradient = gate_gradient
    twin = masked(model)
    x_BCHW = images(name).requires_grad_()
    x_twin = images(name).requires_grad_()
    found, want = model(x_BCHW), twin(x_twin)
    if not training:
        assert len(found.route.unique()) == NETS[name]["num_experts"]
    assert torch.equal(found.route, want.route)
    exact(found.router, want.router)
    exact(found.logits, want.logits)

    push(found, x_BCHW)
    push(want, x_twin)
    exact(x_BCHW.grad, x_twin.grad)
    named, twins = dict(model.named_parameters()), dict(twin.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in twins.values() if p.grad is not None)
    assert list(named) == list(twins)
    for key, parameter in named.items():
        exact(parameter.grad, twins[key].grad, scale)
        assert parameter.grad is not None
        bias = key.endswith(("gate.linear.bias", "router.head.bias"))
        assert parameter.grad.any() or bias, key  # normalized scores leave a bias mere rounding
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        exact(one, other)


@pytest.mark.parametrize("name", FEW)
def test_scores_along_the_own_route_are_the_scores_and_follow_no_other(
    build: Any, name: str
) -> None:
    model, x_BCHW = made(build, name).eval(), images(name)
    own = model(x_BCHW)
    exact(model.scores_along(x_BCHW, own.route), own.router)
    other = model(x_BCHW.flip(0)).route
    held, layers = model.scores_along(x_BCHW, other), model.num_layers
    if not layers:
        exact(held, own.router)
        return
    exact(held[:, 0], own.router[:, 0])
    changed_B = (other[:, :-1] != own.route[:, :-1]).any(1)
    assert changed_B.any()
    assert ((held - own.router).abs().amax((1, 2)) > 1e-6).equal(changed_B)


@pytest.mark.parametrize("name", FEW)
def test_given_route_equals_its_masked_twin(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name), images(name)
    twin, experts = masked(model), NETS[name]["num_experts"]
    for expert in range(experts):
        route = torch.full_like(model(x_BCHW).route, expert)
        exact(model.along(x_BCHW, route), twin.along(x_BCHW, route))
    torch.manual_seed(0)
    route = torch.randint(experts, route.shape)
    exact(model.along(x_BCHW, route), twin.along(x_BCHW, route))


@pytest.mark.parametrize("name", FEW)
def test_own_route_given_back_gives_the_same_logits(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name), images(name)
    found = model(x_BCHW)
    exact(model.along(x_BCHW, found.route), found.logits)


@pytest.mark.parametrize("name", FEW)
def test_given_route_sends_no_gradient_through_the_router(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name), images(name)
    model.along(x_BCHW, model(x_BCHW).route).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == is_router_parameter(key), key


@pytest.mark.parametrize("name", FEW)
def test_router_scores_are_those_of_a_full_pass(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name), images(name)
    assert torch.equal(model.router_scores(x_BCHW), model(x_BCHW).router)


@pytest.mark.parametrize("name", NETS)
def test_images_are_judged_alike_alone_and_in_company(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name), images(name)
    together, alone = model(x_BCHW), [model(x_1CHW) for x_1CHW in x_BCHW.split(1)]
    for part in range(3):
        exact(together[part], torch.cat([outputs[part] for outputs in alone]))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_result_and_gradients_do_not_depend_on_the_size_of_pieces(
    build: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    model = made(build, "small, 4 experts")
    twin = copy.deepcopy(model)
    x_BCHW, x_twin = images("small").requires_grad_(), images("small").requires_grad_()
    want = twin(x_twin)
    monkeypatch.setattr(moe.network, "PIECE", size)
    found = model(x_BCHW)
    exact(found.logits, want.logits)
    push(found, x_BCHW)
    push(want, x_twin)
    exact(x_BCHW.grad, x_twin.grad)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        exact(one.grad, other.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_in_memory_does_not_change_the_result(
    build: Any, layout: torch.memory_format
) -> None:
    model, x_BCHW = made(build, "small"), images("small")
    want = model(x_BCHW).logits
    again = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    exact(again(x_BCHW.contiguous(memory_format=layout)).logits, want)


@pytest.mark.parametrize("name", ["small", "small, per layer", "small, dense"])
def test_wrong_routes_are_refused_with_what_is_valid(build: Any, name: str) -> None:
    model, x_BCHW = made(build, name), images(name)
    route, last = model(x_BCHW).route, NETS[name]["num_experts"] - 1
    shape = str(tuple(route.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"route has shape \(8,.*\), want {shape}"):
        model.along(x_BCHW, route[:8])
    with pytest.raises(ValueError, match=rf"route has shape .*, want {shape}"):
        model.along(x_BCHW, route[..., None])
    for expert in (-1, last + 1):
        wrong = route.clone()
        wrong[-1] = expert
        message = f"route names expert {expert}, valid are 0 to {last}"
        with pytest.raises(ValueError, match=message):
            model.along(x_BCHW, wrong)


def test_all_images_on_one_expert_leave_the_others_a_zero_gradient(build: Any) -> None:
    model = made(build, "small").train()
    model.along(images("small"), torch.ones(BATCH, dtype=torch.int64)).sum().backward()
    for key, parameter in model.named_parameters():
        if key.endswith("weight_FCRR"):
            assert parameter.grad is not None
            idle, used = parameter.grad.chunk(2)
            assert not idle.any()
            assert used.any()


def test_straight_through_gradient_reaches_the_router(build: Any) -> None:
    model = made(build, "small")
    model(images("small")).logits.square().sum().backward()
    assert model.router is not None
    assert all(p.grad is not None and p.grad.any() for p in model.router.parameters())


def test_pixels_are_normalized_inside(build: Any) -> None:
    model = BACKBONES["small"]().build(4, 8)
    x_BCHW = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert not model.normalize(x_BCHW).any()
