"""Forced routes in training against a masked twin, and the experts that classes are sent to.

Shapes: B images, E experts, K classes.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.network import Network
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.forced_routes import DrawnRoutes, draw_routes
from pipeline.algorithms.homes import home_of
from pipeline.algorithms.upcycled_adv_moe import UpcycledAdvMoE
from pipeline.attacks.pgd import PGD
from pipeline.data.cifar import SUPERCLASS, Cifar10, Cifar100
from pipeline.optimization.state import TrainState
from pipeline.seeding import Noise, generator_at
from tests.pipeline.algorithms.test_algorithms import batch, training

DATA = Path(os.environ.get("ROBUST_MOE_DATA") or Path(__file__).parents[3] / "data")


def divergence(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    return (p_BK.softmax(-1) * (p_BK.log_softmax(-1) - q_BK.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_aim_is_that_of_the_drawn_expert_and_leaves_its_router_alone(
    build: Callable[..., Network], kind: Any
) -> None:
    model, (x, y_B) = build(ratio=0.125).eval(), batch(8)
    forced_B = torch.tensor([True, False] * 4)
    drawn = DrawnRoutes(forced_B, torch.arange(8) % 2)
    moved = (x + 0.05 * torch.rand(x.shape, generator=generator_at("cpu", 3))).clamp(0, 1)
    with torch.no_grad():
        found_B = drawn.aim(kind, y_B)(model, x)(moved)
        clean, own = model(x), model(moved)
        for place in range(8):
            expert = drawn.expert_B[place] if forced_B[place] else own.route[place]
            logits = model.along(moved[place : place + 1], expert.view(1))
            one = slice(place, place + 1)
            want = divergence(clean.logits[one], logits)
            if kind == "ce":
                want = F.cross_entropy(logits, y_B[one], reduction="none")
            if not forced_B[place]:
                want = want + divergence(clean.router[one], own.router[one])
            torch.testing.assert_close(found_B[one], want, rtol=1e-4, atol=1e-5)


def test_share_and_experts_are_drawn_evenly_whatever_the_workers(small: Network) -> None:
    x = torch.rand(600, 3, 8, 8)
    state = TrainState(small, {}, noise=Noise(generator_at("cpu", 1)))
    whole = draw_routes(state, x, 0.3)
    assert whole.forced_B.float().mean().item() == pytest.approx(0.3, abs=0.06)
    share_E = whole.expert_B.bincount(minlength=small.num_experts) / 600
    assert share_E.min().item() == pytest.approx(1 / small.num_experts, abs=0.06)
    parts = []
    for rank in range(2):
        state.noise = Noise(generator_at("cpu", 1), rank, 2)
        parts.append(draw_routes(state, x[:300], 0.3))
    assert torch.equal(torch.cat([part.forced_B for part in parts]), whole.forced_B)
    assert torch.equal(torch.cat([part.expert_B for part in parts]), whole.expert_B)


def test_experts_that_no_image_chose_learn_from_forced_ones(small: Network) -> None:
    """A router that sends all images to expert 0; only forced ones reach the other."""
    with torch.no_grad():
        small.router.balance.running_mean.copy_(torch.tensor([-100.0, 100.0]))  # type: ignore[union-attr]
    moved = {}
    for share in (0.0, 1.0):
        state = training(copy.deepcopy(small))
        before = state.model.body.blocks[0].conv1.conv.weight_FCRR.detach().clone()
        AdvMoE(attack=PGD(steps=1), forced_routes=share)._step_experts(state, *batch())
        after = state.model.body.blocks[0].conv1.conv.weight_FCRR.detach()
        decay = before * (1 - 0.05 * 5e-4)
        moved[share] = (after - decay).chunk(2)[1].abs().max().item()
    assert moved[0.0] < 1e-6 < moved[1.0]


def test_homes_are_blocks_of_groups() -> None:
    y_B, groups = torch.arange(10), Cifar10.groups
    assert home_of("mod", y_B, groups, 3).tolist() == [0, 1, 2] * 3 + [0]
    animals = ["bird", "cat", "deer", "dog", "frog", "horse"]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    homes_K = home_of("superclass", y_B, groups, 2)
    assert [name for name, home in zip(names, homes_K, strict=True) if home] == animals
    fine_B = torch.arange(100)
    for experts in (2, 4, 5, 20):
        homes_B = home_of("superclass", fine_B, Cifar100.groups, experts)
        assert homes_B.bincount().tolist() == [100 // experts] * experts
    with pytest.raises(ValueError, match="num_experts must be at most 2, got 3"):
        home_of("superclass", y_B, groups, 3)
    with pytest.raises(ValueError, match="needs a data set with groups of classes"):
        home_of("superclass", y_B, (), 2)


@pytest.mark.skipif(
    not list((DATA / "cifar100").glob("train*.parquet")), reason="no CIFAR-100 here"
)
def test_superclasses_are_those_of_the_files() -> None:
    import pyarrow.parquet as pq

    file = sorted((DATA / "cifar100").glob("train*.parquet"))[0]
    table = pq.read_table(file, columns=["fine_label", "coarse_label"])
    pairs = zip(table["fine_label"].to_pylist(), table["coarse_label"].to_pylist(), strict=True)
    assert all(SUPERCLASS[fine] == coarse for fine, coarse in set(pairs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"homes": "none"}, "homes must be mod or superclass, got 'none'"),
        ({"forced_routes": 1.1}, "forced_routes must be from 0 to 1, got 1.1"),
        ({"dense_share": 1.0}, "dense_share must be above 0 and below 1, got 1.0"),
        ({"mixture_rate": 0.0}, "mixture_rate must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpcycledAdvMoE(**settings)
