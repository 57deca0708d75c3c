"""Costs against AdvMoE's architecture, worked out by hand and by closed formulas."""

from typing import Any

import pytest
import torch
from torch import nn

from moe.backbones import BACKBONES
from moe.cost import Cost, cost
from moe.layers import MoEConv2d
from moe.network import Network
from tests.conftest import LAYERED

PUBLISHED = [  # backbone, image side, experts, ratio, GMAC, 10^6 parameters
    pytest.param("resnet18", 32, 1, 1.0, 0.5554, 11.17, id="resnet18, dense"),
    pytest.param("resnet18", 32, 1, 0.5, 0.1393, 2.80, id="resnet18, S-Dense"),
    pytest.param("resnet18", 32, 2, 0.5, 0.1923, 5.83, id="resnet18, mixture"),
    pytest.param("resnet18", 224, 1, 1.0, 1.814, 11.69, id="resnet18, dense, 224 px"),
    pytest.param("resnet18", 224, 1, 0.5, 0.483, 3.06, id="resnet18, S-Dense, 224 px"),
    pytest.param("resnet18", 224, 2, 0.5, 0.483 + 0.0406, 6.11, id="resnet18, mixture, 224 px"),
    pytest.param("wrn28_10", 32, 1, 1.0, 5.243, 36.48, id="wrn28_10, dense"),
    pytest.param("wrn28_10", 32, 1, 0.5, 1.311, 9.13, id="wrn28_10, S-Dense"),
    pytest.param("wrn28_10", 32, 2, 0.5, 1.352, 18.51, id="wrn28_10, mixture"),
    pytest.param("vgg16", 32, 1, 1.0, 0.3138, 15.31, id="vgg16, dense"),
    pytest.param("vgg16", 32, 1, 0.5, 0.0791, 4.01, id="vgg16, S-Dense"),
    pytest.param("vgg16", 32, 2, 0.5, 0.1196, 7.96, id="vgg16, mixture"),
    pytest.param("densenet", 32, 1, 1.0, 0.0724, 0.176, id="densenet, dense"),
    pytest.param("densenet", 32, 1, 0.5, 0.0183, 0.046, id="densenet, S-Dense"),
]
CELLS = [  # the grid: backbone, image side, classes
    pytest.param(name, size, classes, id=f"{name}, {classes} classes, {size} px")
    for name in ("resnet18", "wrn28_10", "vgg16", "densenet")
    for size, classes in ((32, 10), (32, 100), (64, 200), (224, 1000))
]


def counted(
    name: str, size: int, num_experts: int, ratio: float = 0.5, classes: int = 10, **more: Any
) -> Cost:
    """Count a backbone without memory or arithmetic."""
    with torch.device("meta"):
        backbone = BACKBONES[name](num_experts=num_experts, ratio=ratio, **more)
        return cost(backbone.build(classes, size), size)


@pytest.mark.parametrize(("name", "size", "num_experts", "ratio", "gmac", "millions"), PUBLISHED)
def test_backbone_costs_what_the_paper_says(
    name: str, size: int, num_experts: int, ratio: float, gmac: float, millions: float
) -> None:
    found = counted(name, size, num_experts, ratio, 10 if size == 32 else 1000)
    assert found.gmac == pytest.approx(gmac, rel=0.01)
    assert found.params / 1e6 == pytest.approx(millions, rel=0.01)
    assert (found.gmac_router > 0) == (num_experts > 1)


@pytest.mark.parametrize(("name", "size", "classes"), CELLS)
def test_mixture_costs_at_most_half_of_the_dense_net_in_every_cell(
    name: str, size: int, classes: int
) -> None:
    dense, mixture = counted(name, size, 1, 1.0, classes), counted(name, size, 2, 0.5, classes)
    assert mixture.gmac <= dense.gmac / 2
    assert dense.gmac > 0
    if size == 224 or name == "densenet":
        assert 0 < mixture.gmac_router < 0.05 * dense.gmac


@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("resnet18", 32, 16),
        ("resnet18", 224, 19),
        ("wrn28_10", 32, 27),
        ("wrn28_10", 224, 27),
        ("vgg16", 32, 12),
        ("vgg16", 224, 12),
        ("densenet", 32, 36),
        ("densenet", 224, 116),
    ],
)
def test_backbone_has_its_mixture_convolutions(name: str, size: int, layers: int) -> None:
    with torch.device("meta"):
        modules = BACKBONES[name](num_experts=2, ratio=0.5).build(10, size).modules()
    assert sum(isinstance(module, MoEConv2d) for module in modules) == layers


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("name", ["resnet18", "wrn28_10", "vgg16"])
def test_router_is_that_of_the_paper_and_does_not_grow_with_the_image(name: str, size: int) -> None:
    found = counted(name, size, 2)
    assert found.params_router == 269_202
    assert found.gmac_router == pytest.approx(0.0406, rel=0.01)


def test_densenets_router_is_smaller_than_the_net_that_it_serves() -> None:
    found = counted("densenet", 32, 2)
    assert found.gmac_router == pytest.approx(0.00317, rel=0.01)
    assert found.params_router == 18_954


@pytest.mark.parametrize("width", [16, 32, 64])
def test_narrow_resnet18_is_the_dense_net_of_that_ratio_and_keeps_its_routers_share(
    width: int,
) -> None:
    dense = counted("resnet18", 32, 1, 1.0, width=width)
    assert dense == counted("resnet18", 32, 1, width / 64)
    share = counted("resnet18", 32, 2, 0.5, width=width).gmac_router / dense.gmac
    assert share == pytest.approx(0.073, rel=0.1)


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("name", LAYERED)
def test_counting_without_numbers_agrees_with_counting_a_real_pass(name: str, scope: str) -> None:
    backbone = BACKBONES[name](num_experts=3, ratio=0.125, router_scope=scope)
    assert cost(backbone.build(10, 16), 16) == counted(name, 16, 3, 0.125, router_scope=scope)


def test_more_experts_cost_parameters_and_no_operations() -> None:
    two, four = counted("resnet18", 32, 2), counted("resnet18", 32, 4)
    assert four.gmac == pytest.approx(two.gmac, rel=1e-5)
    assert four.params > 1.8 * two.params


def multiply_accumulates(model: nn.Module, size: int) -> int:
    """Run one image and add up ``D C R^2 P Q`` of each convolution and ``C D`` of each linear map.

    C and D are the channels in and out (of one expert), R the kernel's side, P and Q those of what
    comes out.
    """
    total = 0

    def add(module: nn.Module, _: object, y: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, MoEConv2d):
            total += module.weight_FCRR.numel() // module.num_experts * y[0, 0].numel()
        else:
            assert isinstance(module, nn.Conv2d | nn.Linear)
            total += module.weight.numel() * (y[0, 0].numel() if y.dim() == 4 else 1)

    kinds = (MoEConv2d, nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, kinds)]
    blank = torch.zeros(1, 3, size, size)
    model.eval()(blank)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("settings", [{"num_experts": 1}, {"num_experts": 2}, {"num_experts": 4}])
@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("name", LAYERED)
def test_net_costs_what_its_layers_add_up_to(
    name: str, size: int, settings: dict[str, int], scope: str
) -> None:
    model = BACKBONES[name](**settings, ratio=0.125, router_scope=scope).build(10, size)
    found = cost(model, size)
    assert found.gmac == pytest.approx(multiply_accumulates(model, size) / 1e9, rel=1e-9)
    if model.router is not None:
        router = multiply_accumulates(model.router, size)
        assert found.gmac_router == pytest.approx(router / 1e9, rel=1e-9)


def test_gates_of_layers_are_the_router_of_a_per_layer_net() -> None:
    model = BACKBONES["small"](num_experts=2, router_scope="per_layer").build(10, 32)
    channels = [m.weight_FCRR.shape[1] for m in model.modules() if isinstance(m, MoEConv2d)]
    found = cost(model, 32)
    assert found.gmac_router == pytest.approx(2 * sum(channels) / 1e9, rel=1e-9)
    assert found.params_router == 2 * sum(channels) + 2 * len(channels)


def test_hand_made_net_costs_what_it_should() -> None:
    """One 3x3 convolution of 3 to 4 channels on 5 px, and a router of one linear map."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = MoEConv2d(3, 4, 3, num_experts=2)

        def forward(self, x_BCHW: torch.Tensor, routing: object) -> torch.Tensor:
            return self.conv(x_BCHW, routing).mean((2, 3))  # type: ignore[arg-type, no-any-return]

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(75, 2)

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return self.linear(x_BCHW.flatten(1))  # type: ignore[no-any-return]

    model = Network(Body(), Router(), normalize=nn.Identity(), num_experts=2)  # type: ignore[arg-type]
    assert cost(model, 5) == Cost(
        gmac=(3 * 4 * 9 * 25 + 150) / 1e9,
        gmac_router=150 / 1e9,
        params=2 * 4 * 27 + 152,
        params_router=152,
    )


def test_counting_leaves_the_model_as_it_was() -> None:
    model = BACKBONES["small"]().build(4, 8).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost(model, 8)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
