"""Every backbone of the registry: shapes, parameter groups, dense twins, refused settings."""

import math
from collections import Counter
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.backbones import BACKBONES
from moe.backbones.blocks import ACTIVATIONS
from moe.layers import MoEConv2d
from moe.network import is_router_parameter
from tests.conftest import LAYERED

SCOPES = ("shared", "per_layer")
SINGLE = [name for name in BACKBONES if name != "dual"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", LAYERED)
def test_backbone_maps_pixels_to_logits_scores_and_route(
    name: str, size: int, num_experts: int, scope: str
) -> None:
    backbone = BACKBONES[name](num_experts=num_experts, ratio=0.125, router_scope=scope)
    model = backbone.build(7, size).eval()
    with torch.no_grad():
        logits_BK, router, route, _ = model(torch.rand(2, 3, size, size))
    assert logits_BK.shape == (2, 7)
    layers = (model.num_layers,) if scope == "per_layer" and num_experts > 1 else ()
    assert router.shape == (2, *layers, num_experts)
    assert route.shape == (2, *layers)
    assert route.dtype == torch.int64
    assert torch.equal(route, router.argmax(-1))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", LAYERED)
def test_names_tell_the_routers_parameters_from_the_experts(name: str, scope: str) -> None:
    model = BACKBONES[name](num_experts=2, ratio=0.125, router_scope=scope).build(4, 8)
    found = {id(p) for key, p in model.named_parameters() if is_router_parameter(key)}
    if scope == "shared":
        assert model.router is not None
        want = {id(p) for p in model.router.parameters()}
    else:
        assert model.router is None
        layers = [m for m in model.modules() if isinstance(m, MoEConv2d)]
        assert len(layers) == model.num_layers
        want = {id(p) for m in layers if m.gate is not None for p in m.gate.parameters()}
    assert found == want != set()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", LAYERED)
def test_one_expert_is_a_dense_net_without_a_router(name: str, scope: str) -> None:
    model = BACKBONES[name](num_experts=1, ratio=0.125, router_scope=scope).build(4, 8)
    assert model.router is None
    assert model.num_layers == 0
    assert not any(is_router_parameter(key) for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", LAYERED)
def test_experts_of_a_mixture_are_as_wide_as_the_ratio_says(name: str) -> None:
    def widths(num_experts: int, ratio: float) -> list[int]:
        model = BACKBONES[name](num_experts=num_experts, ratio=ratio).build(4, 8)
        layers = [m for m in model.modules() if isinstance(m, MoEConv2d)]
        return [len(m.weight_FCRR) // m.num_experts for m in layers]

    full = widths(1, 1.0)
    assert widths(3, 0.5) == [width // 2 for width in full]
    assert widths(1, 0.25) == [width // 4 for width in full]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("size", [33, 64, 65])
@pytest.mark.parametrize("name", LAYERED)
def test_forms_for_larger_images_classify_and_normalize_as_their_data_do(
    name: str, size: int, scope: str
) -> None:
    model = BACKBONES[name](ratio=0.0625 if size > 64 else 0.125, router_scope=scope).build(7, size)
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, size, size)).logits.shape == (2, 7)
    large = size > 64 and name != "small"
    assert float(model.normalize.mean[0, 0]) == pytest.approx(0.485 if large else 0.4914)


class Activations(TorchDispatchMode):
    """Count the activations of a forward pass by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        self.found.update([name] if name.rstrip("_") in ACTIVATIONS else [])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [32, 65])
@pytest.mark.parametrize("name", LAYERED)
def test_activation_is_the_same_everywhere_and_relu_is_in_place(name: str, size: int) -> None:
    def used(activation: str) -> dict[str, int]:
        backbone = BACKBONES[name](num_experts=1, activation=activation)
        with torch.device("meta"), torch.no_grad(), Activations() as mode:
            backbone.build(4, size).eval()(torch.zeros(1, 3, size, size))
        return mode.found

    times = used("relu")["relu_"]
    assert times > 0
    assert used("relu") == {"relu_": times}
    assert used("silu") == {"silu": times}
    assert used("softplus") == {"softplus": times}


def test_softplus_stays_within_seven_hundredths_above_relu() -> None:
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    gap = ACTIVATIONS["softplus"](x.clone()) - ACTIVATIONS["relu"](x.clone())
    assert gap.max() == gap[500] == pytest.approx(math.log(2) / 10)
    assert gap.min() >= 0


def test_only_thin_dense_nets_and_large_images_have_a_thin_stem() -> None:
    def stem(num_experts: int, size: int) -> int:
        model = BACKBONES["resnet18"](num_experts=num_experts, ratio=0.5).build(4, size)
        return int(model.body.stem.conv.weight.shape[0])

    assert [stem(2, 32), stem(1, 32), stem(2, 65), stem(1, 65)] == [64, 32, 32, 32]


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0}, "ratio must be above 0 and at most 1, got 0"),
        ({"ratio": 1.5}, "ratio must be above 0 and at most 1, got 1.5"),
        ({"ratio": float("nan")}, "ratio must be above 0 and at most 1, got nan"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"router_scope": "x"}, "router_scope must be shared or per_layer, got 'x'"),
        ({"activation": "x"}, "activation must be relu, silu or softplus, got 'x'"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_valid(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BACKBONES[name](**settings)


def test_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        BACKBONES["resnet18"](width=0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", SINGLE)
def test_ratio_that_leaves_no_channel_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"ratio 0\.001 leaves no channel of \d+; at least 0\.\d"):
        BACKBONES[name](ratio=0.001).build(4, 32)


@pytest.mark.parametrize("name", SINGLE)
def test_settings_are_frozen(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        BACKBONES[name]().ratio = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", SINGLE)
def test_same_seed_gives_the_same_network(name: str) -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(5)
        nets.append(BACKBONES[name](ratio=0.125).build(4, 8))
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
