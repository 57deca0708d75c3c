"""Defences that hide from gradients, and the attacks and checks that see them.

Networks are linear, so that what an attack should find is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures import MEASURES
from pipeline.measures.base import Attacked, is_correct
from pipeline.measures.forced_route import ForcedRoute
from pipeline.measures.gate_queries import GateQueries, route_lead
from pipeline.measures.gradient_attack import WhiteBox, WhiteBoxMargin
from pipeline.measures.hidden_gradients import HiddenGradients, StraightThrough, takes
from pipeline.measures.pixel_grid import OnGrid, judged_on_grid, rounded
from pipeline.measures.random_queries import Queries
from pipeline.measures.runner import judge
from pipeline.measures.sanity.continuous import Continuous
from pipeline.measures.sanity.faithful import (
    FaithfulLogits,
    FaithfulRouter,
    RouterGradient,
    rank_correlation,
)
from pipeline.measures.sanity.probe_attacks import facts, facts_around
from pipeline.seeding import ImageNoise
from tests.helpers import defences

CLASSES, SIZE, COUNT = 4, 6, 64
PIXELS = 3 * SIZE * SIZE
ATTACK = PGD(eps=7.5 / 255, step_size=2 / 255, steps=20)  # its corners are off the grid


def linear(seed: int = 0, scale: float = 1.0) -> Network:
    generator = torch.Generator().manual_seed(seed)
    w_KD = nn.Parameter(scale * torch.randn(CLASSES, PIXELS, generator=generator))
    return defences.dense(lambda x: (x.flatten(1) - 0.5) @ w_KD.T)


def images(model: Network, count: int = COUNT) -> Images:
    generator = torch.Generator().manual_seed(1)
    x_NCHW = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    x_NCHW = torch.where(x_NCHW < 0.5, 0.05 + 0.7 * x_NCHW, 0.25 + 0.7 * x_NCHW)  # none near half
    pixels_NCHW = (255 * x_NCHW).round().to(torch.uint8)
    with torch.no_grad():
        labels_N = model(to_float(pixels_NCHW)).logits.argmax(1)
    return Images(pixels_NCHW, labels_N)


ON_GRID = replace(ATTACK, eps=7 / 255)  # what is left of the radius on the grid


def attacked(
    kind: Callable[..., Any], model: Network, split: Images, attack: PGD = ATTACK
) -> Attacked:
    x_BCHW = to_float(split.pixels_NCHW)
    noise = ImageNoise(0, torch.arange(len(split)))
    found: Attacked = kind(attack=attack)(fold(model), x_BCHW, split.labels_N, noise)
    return found


def stand(kind: Callable[..., Any], model: Network, split: Images, attack: PGD = ATTACK) -> int:
    return int(attacked(kind, model, split, attack).correct_B.sum())


# The grid of pixels


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("levels", [1.0, 7.5, 8.0, 25.5])
def test_rounded_images_are_on_the_grid_in_the_ball_and_near(norm: Any, levels: float) -> None:
    eps = levels / 255 * (1 if norm == "linf" else PIXELS**0.5)
    attack = PGD(eps=eps, norm=norm)
    x_BCHW = to_float(images(linear()).pixels_NCHW)
    x_adv = attack.begin(x_BCHW, ImageNoise(0, torch.arange(COUNT)))
    x_adv[: COUNT // 2] = attack.project(x_BCHW + 1e3 * (x_adv - x_BCHW), x_BCHW)[: COUNT // 2]
    near = rounded(attack, x_adv, x_BCHW)
    torch.testing.assert_close(255 * near, (255 * near).round(), rtol=0, atol=1e-3)
    assert ((near - x_adv).abs() < 1.001 / 255).all()
    assert torch.equal(near, near.clamp(0, 1))
    step_BD = (near - x_BCHW).flatten(1)
    far_B = step_BD.abs().amax(1) if norm == "linf" else step_BD.norm(dim=1)
    assert (far_B <= eps + 1e-6).all()


def test_eight_levels_stay_eight() -> None:
    x_BCHW = torch.full((1, 3, 2, 2), 100 / 255)
    for sign in (-1, 1):
        near = rounded(PGD(eps=8 / 255), x_BCHW + sign * 8 / 255, x_BCHW)
        assert (255 * near).round().unique().tolist() == [100 + sign * 8]


def test_gate_that_sees_the_grid_is_fooled_by_images_on_it() -> None:
    """Off the grid a network answers whose pixels hardly move, with the other one's gradient."""
    weak = linear()
    robust = defences.hinted(weak, weak, bits=1, share=0.05)
    model, split = defences.grid_gate(weak, robust), images(weak, 4 * COUNT)
    agreed_N = is_correct(robust, to_float(split.pixels_NCHW), split.labels_N)
    split = split.pick(agreed_N.nonzero().squeeze(1)[:COUNT])
    plain = attacked(WhiteBox, model, split)
    x_BCHW, truth = to_float(split.pixels_NCHW), stand(WhiteBoxMargin, weak, split, ON_GRID)
    assert plain.correct_B.sum() > truth + 10, "attacks leave the grid and meet the robust net"
    both = judged_on_grid(ATTACK, fold(model), plain, x_BCHW, split.labels_N)
    assert both.correct_B.sum() < plain.correct_B.sum()
    assert torch.equal(both.correct_B, is_correct(model, both.x_adv, split.labels_N))
    assert stand(OnGrid, model, split) <= truth + 1
    assert stand(RouterGradient, model, split) == 0
    counted = judge(model, split, {"ra_pgd": WhiteBox(attack=ATTACK)}, seed=0, device=CPU)
    assert torch.equal(counted.correct["ra_pgd"], both.correct_B), "the runner judges both"
    probed = judge(model, split, {"steps 20": WhiteBox(attack=ATTACK)}, seed=0, device=CPU)
    assert torch.equal(probed.correct["steps 20"], plain.correct_B), "a probe is what it is"


CPU = torch.device("cpu")


def test_grid_attack_of_an_honest_net_is_as_strong_as_any() -> None:
    model = linear()
    split = images(model)
    assert abs(stand(OnGrid, model, split) - stand(WhiteBoxMargin, model, split, ON_GRID)) <= 1


# Functions without a gradient

HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: (15 * x).round() / 15,
    "floor": lambda x: torch.floor(15 * x) / 15,
    "cast to bytes": lambda x: (15 * x).to(torch.uint8).to(x) / 15,
    "cast by name": lambda x: (15 * x).long().float() / 15,
    "remainder": lambda x: x - torch.remainder(x, 1 / 15),
    "modulo": lambda x: x - x % (1 / 15),
    "comparisons": lambda x: sum((x > (k + 0.5) / 15).float() for k in range(15)) / 15,
    "choices": lambda x: sum(torch.where(x >= (k + 0.5) / 15, 1.0, 0.0) for k in range(15)) / 15,
    "saturation": lambda x: sum(torch.sigmoid(1e4 * (x - (k + 0.5) / 15)) for k in range(15)) / 15,
}


@pytest.mark.parametrize("name", HIDING)
def test_hidden_gradient_is_found_whatever_hides_it(name: str) -> None:
    net, hint = linear(), linear(seed=5)
    layer = HIDING[name]
    model = defences.dense(lambda x: net(layer(x)).logits + 1e-3 * hint(x).logits)
    split = images(model)
    left, found = stand(WhiteBoxMargin, model, split), stand(HiddenGradients, model, split)
    assert found < left - 10, (left, found)
    assert stand(FaithfulLogits, model, split) < 0.5 * COUNT
    assert stand(FaithfulLogits, net, split) == COUNT


def test_straight_through_is_the_function_forward_and_the_identity_backward() -> None:
    x = torch.tensor([0.2, 1.7, -2.3], requires_grad=True)
    for function, want in (
        (torch.round, torch.round(x)),
        (torch.sign, torch.sign(x)),
        (lambda t: t.clamp(0, 1), x.clamp(0, 1)),
        (lambda t: t.int(), torch.tensor([0.0, 1.0, -2.0])),
    ):
        with StraightThrough():
            found = function(x)
        assert torch.equal(found.detach(), want.detach())
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert gradient.tolist() == [1.0, 1.0, 1.0]
    plain = torch.rand(3)
    with StraightThrough():
        assert torch.equal(plain.round(), plain.detach().round())
        assert plain.long().dtype == torch.int64, "what needs no gradient stays whole"


CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "one_hot": lambda z: nn.functional.one_hot(z.argmax(1), CLASSES).to(z),
    "row of a table": lambda z: torch.eye(CLASSES)[z.argmax(dim=-1)],
}


@pytest.mark.parametrize("code", CODES)
def test_code_of_an_answer_is_attacked_through_and_its_jump_is_seen(code: str) -> None:
    """Every margin is that of another network plus a constant: exact gradients, to nowhere."""
    net, other = linear(scale=0.1), linear(seed=7, scale=0.1)
    model = defences.dense(lambda x: 20 * CODES[code](net(x).logits) + other(x).logits)
    split = images(net)
    truth, plain = stand(WhiteBoxMargin, net, split), stand(WhiteBoxMargin, model, split)
    assert plain > truth + 40
    assert stand(HiddenGradients, model, split) < plain - 20
    assert stand(FaithfulLogits, model, split) > 0.9 * COUNT, "the gradients are right"
    assert stand(Continuous, model, split) == 0


def test_margins_of_continuous_networks_meet_and_hard_gates_may_jump() -> None:
    split = images(linear())
    assert stand(Continuous, linear(), split) == COUNT
    assert stand(Continuous, linear(scale=1e4), split) == COUNT

    def scores(x: Tensor) -> Tensor:
        height_B = x[:, 0].mean((1, 2)) - 0.5
        return torch.stack([height_B, -height_B], 1)

    gated = defences.routed(scores, linear(), linear(seed=7))
    assert stand(Continuous, gated, split) == COUNT


def test_network_that_indexes_by_pixels_is_attacked_as_it_is() -> None:
    table_K = torch.linspace(0, 1, 256)
    net = linear()
    model = defences.dense(lambda x: net(table_K[(255 * x).long().clamp(0, 255)]).logits)
    assert not takes(model, torch.rand(1, 3, SIZE, SIZE))
    assert stand(HiddenGradients, model, images(net)) >= COUNT - 2, "it stands: Queries see it"
    assert stand(Queries, model, images(net)) < COUNT


def test_dice_are_averaged_out() -> None:
    net = linear()

    def noisy(x: Tensor) -> Tensor:
        found = net(x + 0.2 * torch.randn_like(x)).logits
        return found + 0 * x.flatten(1).sum(1, keepdim=True)

    torch.manual_seed(0)
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return noisy(x)

    attacked(HiddenGradients, defences.dense(counted), images(net))
    assert calls > 8 * ATTACK.steps


# Gradients that lead elsewhere


@pytest.mark.parametrize("layer", [defences.Permuted.apply, defences.Turned.apply])
def test_gradient_of_another_direction_is_not_faithful(layer: Any) -> None:
    net = linear()
    split = images(net)
    assert stand(FaithfulLogits, defences.hard_gradient(net, layer), split) < 0.5 * COUNT
    for scale in (1e-4, 1.0, 1e4):
        scaled = defences.dense(lambda x, k=scale: k * net(x).logits)
        assert stand(FaithfulLogits, scaled, split) == COUNT


def router(layer: Callable[[Tensor], Tensor]) -> Network:
    generator = torch.Generator().manual_seed(3)
    w_D = torch.randn(PIXELS, generator=generator)

    def scores(x: Tensor) -> Tensor:
        height_B = (layer(x).flatten(1) - 0.5) @ w_D
        return torch.stack([-height_B, height_B], 1)

    return defences.routed(scores, linear(), linear(seed=2))


def test_router_is_looked_at_far_from_a_boundary_and_near() -> None:
    honest = router(lambda x: x)
    split = images(honest)
    assert stand(RouterGradient, honest, split) == stand(FaithfulRouter, honest, split) == COUNT
    coarse = router(lambda x: defences.coarse(x, 2))
    assert stand(RouterGradient, coarse, split) == stand(FaithfulRouter, coarse, split) == 0
    for layer in (defences.Permuted.apply, defences.Turned.apply):
        wrong = router(layer)
        assert stand(RouterGradient, wrong, split) == COUNT, "it has one, and a wrong one"
        assert stand(FaithfulRouter, wrong, split) < 0.5 * COUNT


def stepped(levels: int) -> Callable[[Tensor], Tensor]:
    """Scores of two experts by the mean pixel, in steps: no gradient."""

    def scores(x: Tensor) -> Tensor:
        height_B = (levels * (x.flatten(1).mean(1) - 0.5)).round() + 0.5
        return torch.stack([-height_B, height_B], 1)

    return scores


def test_gate_without_a_gradient_is_reached_by_queries() -> None:
    """The second expert is always wrong on these labels: who reaches it breaks the image."""
    first = linear()
    wrong = defences.dense(lambda x: -first(x).logits)
    robust = defences.dense(lambda x: first(x.round()).logits)
    mixture = defences.routed(stepped(1000), robust, wrong)
    x_BCHW = to_float(images(first).pixels_NCHW)
    level_B111 = x_BCHW.mean((1, 2, 3), keepdim=True)
    dark = (x_BCHW - level_B111 + 0.49).clamp(0, 1)  # of the first expert, near the second
    labels_B = robust(dark).logits.argmax(1)
    assert (mixture(dark).route == 0).all()
    noise = ImageNoise(0, torch.arange(len(dark)))
    blind = ForcedRoute(attack=ATTACK)(fold(mixture), dark, labels_B, noise)
    found = GateQueries(attack=ATTACK)(fold(mixture), dark, labels_B, noise)
    assert found.correct_B.sum() <= 0.2 * len(dark)
    assert found.correct_B.sum() < blind.correct_B.sum()
    assert torch.equal(found.correct_B, is_correct(mixture, found.x_adv, labels_B))
    assert ((found.x_adv - dark).abs() <= ATTACK.eps + 1e-6).all()


def test_lead_is_positive_on_the_route_and_negative_elsewhere() -> None:
    mixture = defences.routed(stepped(20), linear(), linear(seed=2))
    x_BCHW = to_float(images(linear()).pixels_NCHW)
    route_B = mixture(x_BCHW).route
    assert (route_lead(mixture, route_B)(x_BCHW) > 0).all()
    assert (route_lead(mixture, 1 - route_B)(x_BCHW) < 0).all()


def test_gate_queries_refuse_what_asks_nothing() -> None:
    for fields in ({"queries": 0}, {"samples": 0}, {"width": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            GateQueries(**fields)


def test_rank_correlation_of_known_rows() -> None:
    a_BJ = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    b_BJ = torch.tensor([[10.0, 20, 40, 80], [4, 3, 2, 1], [7, 7, 7, 7]])
    found_B = rank_correlation(a_BJ, b_BJ)
    torch.testing.assert_close(found_B[:2], torch.tensor([1.0, -1.0]).double())
    assert found_B[2].isnan()


def test_all_of_them_can_be_asked_for() -> None:
    assert {"ra_grid", "ra_hidden", "ra_queries"} <= MEASURES.keys()


def test_dice_on_attacked_images_alone_are_seen() -> None:
    net = linear()

    def thrown(x: Tensor) -> Tensor:
        off_B = (255 * x - (255 * x).round()).abs().flatten(1).amax(1) > 1e-3
        found: Tensor = net(x).logits
        return found + off_B[:, None] * torch.randn_like(found)

    split, attack = images(net), ATTACK
    x_BCHW = to_float(split.pixels_NCHW)
    model = fold(defences.dense(thrown))
    assert facts(model, x_BCHW).repeat == 0
    assert facts_around(model, x_BCHW, split.labels_N, attack).repeat > 1e-2
    assert facts_around(fold(net), x_BCHW, split.labels_N, attack).repeat == 0
