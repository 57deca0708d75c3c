"""Certified constants against pairs of images, exact ones, and the search for larger ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from moe.backbones import BACKBONES
from moe.backbones.blocks import ACTIVATIONS
from moe.certification.difference_constants import (
    affine_rows,
    difference_constants,
    sampled_constant,
)
from moe.certification.lipschitz_bounds import STEEPEST, NoBoundError, reach
from moe.fold_batchnorm import fold
from moe.network import Network
from tests.conftest import settled

NETS: dict[str, dict[str, Any]] = {
    "small": {},
    "small, silu": {"activation": "silu"},
    "resnet18": {"backbone": "resnet18"},
    "resnet18 above 64 px": {"backbone": "resnet18", "size": 65},
    "wrn28_10": {"backbone": "wrn28_10"},
    "vgg16": {"backbone": "vgg16", "num_experts": 3},
    "densenet": {"backbone": "densenet", "ratio": 0.25},
    "mixture": {"backbone": "mixture"},
    "lipschitz": {"backbone": "lipschitz", "num_experts": 1},
}


def made(build: Any, name: str) -> tuple[Network, Tensor]:
    settings = {"num_experts": 2, "ratio": 1 / 16, **NETS[name]}
    model: Network = build(**settings).double()
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
    size = settings.get("size", 8)
    return model, torch.rand(6, 3, size, size).double()


def along(model: Network, expert: int) -> Callable[[Tensor], Tensor]:
    return lambda x: model.along(x, torch.full((len(x),), expert))


@pytest.mark.parametrize("name", NETS)
def test_no_two_images_are_further_apart_than_the_constants_allow(build: Any, name: str) -> None:
    """Near ones and far ones, along each expert, through the router, folded or not."""
    model, x_BCHW = made(build, name)
    functions = [along(model, expert) for expert in range(model.num_experts)]
    functions += [model.router_scores, along(fold(model), 0)]
    for function in functions:
        found = reach(function, x_BCHW[:1])
        for step in (1e-4, 0.1, 1.0):
            moved = x_BCHW + step * (2 * torch.rand_like(x_BCHW) - 1)
            with torch.no_grad():
                rise_BK = (function(moved) - function(x_BCHW)) / step
            assert (rise_BK.abs() <= found.each + 1e-9).all()
            apart_BKK = (rise_BK[:, :, None] - rise_BK[:, None]).abs()
            assert (apart_BKK <= found.pairs + 1e-9).all()


def test_convolution_is_the_largest_sum_of_weights_into_one_channel() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, stride=2).double()
    found = reach(conv, torch.rand(1, 3, 9, 9).double())
    sums_D = conv.weight.detach().abs().sum((1, 2, 3))
    assert_close(found.each.amax((0, 2, 3)), sums_D)
    assert found.each[0, 0, 0, 0] < sums_D[0], "padding does not move"


def test_branches_add_up_and_channels_side_by_side_do_not() -> None:
    one = nn.Linear(4, 3, bias=False).double()
    x_14 = torch.rand(1, 4).double()
    sums_K = one.weight.detach().abs().sum(1)
    assert_close(reach(lambda x: one(x) + x[:, :3], x_14).each[0], sums_K + 1)
    assert_close(reach(lambda x: torch.cat([one(x), x], 1), x_14).each[0, :3], sums_K)
    assert_close(reach(lambda x: F.relu(one(x)) - one(x), x_14).each[0], 2 * sums_K)


def test_batch_norm_scales_by_its_running_statistics_and_in_training_has_no_bound() -> None:
    norm = nn.BatchNorm2d(3).double()
    norm.weight.data = torch.tensor([-2.0, 1.0, 0.0]).double()
    assert norm.running_var is not None
    norm.running_var.copy_(torch.tensor([0.25, 4.0, 1.0]))
    x_1CHW = torch.rand(1, 3, 2, 2).double()
    want = torch.tensor([4.0, 0.5, 0.0]).double()
    assert_close(reach(norm.eval(), x_1CHW).each[0, :, 0, 0], want, rtol=1e-4, atol=0)
    with pytest.raises(NoBoundError, match="training mode"):
        reach(norm.train(), x_1CHW)


def test_softmax_moves_by_at_most_half_of_what_logits_do() -> None:
    found = reach(lambda x: (3 * x).softmax(1), torch.rand(1, 7).double())
    assert_close(found.each, torch.full((1, 7), 1.5).double())


def test_affine_functions_have_exact_constants() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3)
    ).double()
    x_1CHW = torch.rand(1, 3, 8, 8).double()
    rows_KD = affine_rows(net, x_1CHW)
    assert rows_KD is not None
    assert_close(net(x_1CHW) - net(0 * x_1CHW), (rows_KD @ x_1CHW.flatten())[None])
    want_KK = (rows_KD[:, None] - rows_KD).abs().sum(2)
    assert_close(difference_constants(net, x_1CHW), want_KK)
    assert (reach(net, x_1CHW).pairs > 1.01 * want_KK + torch.eye(3)).sum() == 6, "layer by layer"
    assert affine_rows(lambda x: net(x).relu(), x_1CHW) is None
    grey = torch.full_like(x_1CHW, 0.5)
    reached = sampled_constant(lambda x: net(x)[:, 0] - net(x)[:, 1], grey, eps=0.1, steps=3)
    assert_close(reached, want_KK[:1, 1])


def test_differences_of_classes_are_tighter_than_both_classes_together() -> None:
    head = nn.Linear(8, 4).double()
    found = reach(lambda x: head(x.relu()), torch.rand(1, 8).double())
    both_KK = found.each.flatten()[:, None] + found.each.flatten()
    off = ~torch.eye(4, dtype=torch.bool)
    assert (found.pairs < both_KK)[off].all()
    assert not found.pairs.diagonal().any()


def test_sampled_constant_stays_below_the_certified_one_and_finds_more_than_chance(
    build: Any,
) -> None:
    model, x_BCHW = made(build, "small")

    def function(x: Tensor) -> Tensor:
        logits_BK = along(model, 1)(x)
        return logits_BK[:, 0] - logits_BK[:, 2]

    generator = torch.Generator().manual_seed(0)
    found_B = sampled_constant(function, x_BCHW, eps=0.05, generator=generator)
    moved = x_BCHW + 0.05 * (2 * torch.rand_like(x_BCHW) - 1)
    with torch.no_grad():
        chance_B = (function(moved) - function(x_BCHW)).abs() / 0.05
    assert (found_B > 2 * chance_B).all()
    assert (found_B < difference_constants(along(model, 1), x_BCHW[:1])[0, 2]).all()


@pytest.mark.parametrize("name", STEEPEST)
def test_slopes_of_elementwise_functions_are_not_exceeded(name: str) -> None:
    torch_name = {"clamp_min": "relu", "clamp_max": "relu", "neg": "negative"}.get(name, name)
    function = getattr(torch, torch_name, None) or getattr(F, torch_name)
    settings = {"clamp": {"min": -1.0, "max": 1.0}}.get(name, {})
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64, requires_grad=True)
    for more in [settings, {"approximate": "tanh"}] if name == "gelu" else [settings]:
        (slope,) = torch.autograd.grad(function(x, **more).sum(), x)
        assert STEEPEST[name] >= slope.abs().max() > STEEPEST[name] - 0.002


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_the_backbones_are_known(name: Any) -> None:
    found = reach(lambda x: ACTIVATIONS[name](2 * x), torch.rand(1, 3).double())
    assert found.each.max() <= 2 * 1.1


def test_attention_is_refused_by_name_and_so_is_what_nobody_bounded() -> None:
    torch.manual_seed(0)
    attend = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    x_1TC = torch.rand(1, 3, 4).double()
    with pytest.raises(NoBoundError, match="attention has no global Lipschitz constant"):
        reach(lambda x: attend(x, x, x)[0], x_1TC)
    for function, name in (
        (lambda x: F.layer_norm(x, (4,)), "layer_norm: transformers are left out"),
        (lambda x: x * x, "mul of two things that both depend"),
        (lambda x: x.exp(), "operation exp"),
        (lambda x: x.argmax(1).double(), "argmax"),
        (lambda x: x.to(torch.int64).double(), "whole numbers"),
        (lambda x: x * float(x.sum()), "_local_scalar_dense"),
    ):
        with pytest.raises(NoBoundError, match=name):
            reach(function, x_1TC)


def test_vision_transformers_are_refused() -> None:
    model = settled(BACKBONES["vit"](num_experts=1, ratio=0.34).build(4, 8), 8).double()
    with pytest.raises(NoBoundError, match="transformers are left out"):
        reach(lambda x: model(x).logits, torch.rand(1, 3, 8, 8).double())


def test_what_is_written_in_place_moves_under_all_its_names_or_is_refused() -> None:
    def both(x: Tensor) -> Tensor:
        y = 2 * x
        alias = y.detach()
        y.mul_(3)
        return alias

    def part(x: Tensor) -> Tensor:
        y = 2 * x
        y[:, :2].mul_(3)
        return y

    x_14 = torch.rand(1, 4).double()
    assert_close(reach(both, x_14).each, torch.full_like(x_14, 6))
    with pytest.raises(NoBoundError, match="part of a tensor"):
        reach(part, x_14)
