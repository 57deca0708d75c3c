"""Costs against AdvMoE's architecture, worked out by hand and by closed formulas."""

import pytest
import torch
from torch import nn

from moe.backbones import BACKBONES
from moe.cost import Cost, cost
from moe.layers import MoEConv2d
from moe.network import Network

PUBLISHED = [  # image side, experts, ratio, GMAC, 10^6 parameters
    pytest.param(32, 1, 1.0, 0.5554, 11.17, id="dense, 32 px"),
    pytest.param(32, 1, 0.5, 0.1393, 2.80, id="S-Dense, 32 px"),
    pytest.param(32, 2, 0.5, 0.1923, 5.83, id="mixture, 32 px"),
    pytest.param(224, 1, 1.0, 1.814, 11.69, id="dense, 224 px"),
    pytest.param(224, 1, 0.5, 0.483, 3.06, id="S-Dense, 224 px"),
    pytest.param(224, 2, 0.5, 0.483 + 0.0406, 6.11, id="mixture, 224 px"),
]


def resnet18(size: int, num_experts: int, ratio: float = 0.5) -> Network:
    classes = 10 if size == 32 else 1000
    return BACKBONES["resnet18"](num_experts=num_experts, ratio=ratio).build(classes, size)


@pytest.mark.parametrize(("size", "num_experts", "ratio", "gmac", "millions"), PUBLISHED)
def test_resnet18_costs_what_the_paper_says(
    size: int, num_experts: int, ratio: float, gmac: float, millions: float
) -> None:
    found = cost(resnet18(size, num_experts, ratio), size)
    assert found.gmac == pytest.approx(gmac, rel=0.01)
    assert found.params / 1e6 == pytest.approx(millions, rel=0.01)
    assert (found.gmac_router > 0) == (num_experts > 1)


@pytest.mark.parametrize(("size", "layers"), [(32, 16), (224, 19)])
def test_resnet18_has_its_mixture_convolutions(size: int, layers: int) -> None:
    modules = resnet18(size, 2).modules()
    assert sum(isinstance(module, MoEConv2d) for module in modules) == layers


@pytest.mark.parametrize("size", [32, 224])
def test_routers_cost_does_not_grow_with_the_image(size: int) -> None:
    found = cost(resnet18(size, 2), size)
    assert found.params_router == 269_202
    assert found.gmac_router == pytest.approx(0.0406, rel=0.01)


def test_more_experts_cost_parameters_and_no_operations() -> None:
    two, four = cost(resnet18(32, 2), 32), cost(resnet18(32, 4), 32)
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
def test_small_net_costs_what_its_layers_add_up_to(
    size: int, settings: dict[str, int], scope: str
) -> None:
    model = BACKBONES["small"](**settings, ratio=0.25, router_scope=scope).build(10, size)
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
