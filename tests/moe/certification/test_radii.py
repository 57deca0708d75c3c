"""Certificates against closed forms, against each other, and against a search that can fail."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe.backbones import BACKBONES
from moe.backbones.lipschitz import Lipschitz
from moe.certification.lipschitz_bounds import NoBoundError
from moe.certification.margin_floor import floor_radius, margin_floor
from moe.certification.radii import (
    Constants,
    MixtureOutputs,
    Status,
    constants,
    look,
    margins,
    need_of_dual,
    softmax_each,
    softmax_pairs,
    statuses,
    theorem_radius,
    theorem_radius_per_class,
)
from moe.certification.route_radius import plane_distance, route_radius
from moe.mixture_of_networks import LinearRouter, Mixture
from moe.network import Network
from moe.normalize import Normalize
from moe.routing import Routing
from pipeline.attacks.apgd import APGD
from pipeline.attacks.pgd import PGD
from pipeline.optimization.losses import margin_per_image
from pipeline.optimization.norm_bound import bound_norms

SIZE, CLASSES = 4, 3


class Affine(nn.Module):
    """A body that is one linear map of the flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE**2, CLASSES)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        logits_BK: Tensor = self.head(x_BCHW.flatten(1))
        return logits_BK


def affine_network() -> Network:
    return Network(Affine(), None, normalize=Normalize(), num_experts=1)


def mixture(kind: str, *, affine: bool = False, bound: float = 0.6, **settings: Any) -> Mixture:
    """Make a small mixture whose layers are so short that radii are of the size of pixels."""
    torch.manual_seed(0)
    shape = {"hard": (1, "hard"), "top": (2, "softmax"), "all": (3, "softmax")}[kind]
    net = Lipschitz(width=12, depth=1)
    experts = [affine_network() if affine else net.build(CLASSES, SIZE) for _ in range(3)]
    for expert in experts:
        nn.init.normal_(expert.body.head.bias)  # type: ignore[union-attr, arg-type]
    router = LinearRouter(3, SIZE)
    model = Mixture(experts, router, top_k=shape[0], gate=shape[1], **settings)  # type: ignore[arg-type]
    bound_norms(model.parameters(), bound)
    model.gate_gradient = False
    return model.double().eval()


def images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


def proven(model: Network, x_BCHW: Tensor) -> tuple[Constants, MixtureOutputs, Tensor]:
    found = constants(model, x_BCHW[:1])
    with torch.no_grad():
        return found, look(model, x_BCHW, found.top_k), model(x_BCHW).logits.argmax(1)


def certified(model: Network, x_BCHW: Tensor, found: Constants | None = None) -> Tensor:
    """The best radius that there is."""
    own, seen, y_B = proven(model, x_BCHW)
    found = found or own
    return torch.minimum(floor_radius(seen, found, y_B), route_radius(seen, found, x_BCHW))


# --- the search: 10^5 images inside the radii, by gradient, at random and in the corners ---------


def search(model: Network, x_BCHW: Tensor, radius_B: Tensor, tries: int) -> tuple[Tensor, int]:
    """Look for another answer inside each ball; return which fell (B,), and the tries made."""
    with torch.no_grad():
        y_B = model(x_BCHW).logits.argmax(1)
    near_B111 = 0.9999 * radius_B.view(-1, 1, 1, 1)
    low, high = (x_BCHW - near_B111).clamp(min=0), (x_BCHW + near_B111).clamp(max=1)
    fell_B, made = torch.zeros_like(y_B, dtype=torch.bool), 0

    def judge(point: Tensor) -> None:
        nonlocal fell_B, made
        with torch.no_grad():
            fell_B |= model(point).logits.argmax(1) != y_B
        made += len(point)

    def objective(t: Tensor) -> Tensor:
        """The margin as a function of where in its ball, [0, 1], each image is."""
        return margin_per_image(model(low + t * (high - low)).logits, y_B)

    for attack in (PGD(eps=1, step_size=0.2, steps=10), APGD(eps=1, steps=20)):
        for _ in range(3):
            walk = attack.walk(torch.rand_like(x_BCHW), Doubles())
            for _ in range(attack.steps // 2):
                walk.advance(objective, 2)
                for t in walk.points():
                    judge(low + t * (high - low))
    generator = torch.Generator().manual_seed(0)
    while made < tries:
        coin = torch.rand(x_BCHW.shape, generator=generator, dtype=torch.float64)
        judge(low + coin * (high - low))
        judge(torch.where(coin < 0.5, low, high))
    return fell_B, made


class Doubles:
    """Random numbers in the images' own precision."""

    def uniform(self, x_BCHW: Tensor) -> Tensor:
        return 2 * torch.rand_like(x_BCHW) - 1

    def normal(self, x_BCHW: Tensor) -> Tensor:
        return torch.randn_like(x_BCHW)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("kind", ["hard", "top", "all"])
def test_no_attack_breaks_an_image_inside_its_radius(kind: str, mix: Any) -> None:
    """Six mixtures of which each faces 17,000 tries: 10^5 in all."""
    model, x_BCHW = mixture(kind, mix=mix), images(100)
    radius_B = certified(model, x_BCHW)
    assert radius_B.median() > 0.01
    fell_B, made = search(model, x_BCHW, radius_B, 17_000)
    assert made >= 17_000
    assert not fell_B.any()


@pytest.mark.parametrize("kind", ["hard", "top", "all"])
def test_the_same_search_refutes_a_certificate_whose_constants_are_too_small(kind: str) -> None:
    model, x_BCHW = mixture(kind), images(100)
    honest = constants(model, x_BCHW[:1])
    broken = replace(
        honest,
        logits_EKK=honest.logits_EKK / 4,
        scores_EE=honest.scores_EE / 4,
        router_ED=None if honest.router_ED is None else honest.router_ED / 4,
    )
    fell_B, _ = search(model, x_BCHW, certified(model, x_BCHW, broken), 1000)
    assert fell_B.float().mean() > 0.2


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_layers_as_experts_are_certified_along_the_route(build: Any, name: str) -> None:
    """A deep net: the radius is tiny and true; its router is not affine."""
    model = build(name, ratio=0.125).double()
    x_BCHW = torch.rand(8, 3, 8, 8).double()
    found, seen, y_B = proven(model, x_BCHW)
    assert found.router_ED is None
    radius_B = certified(model, x_BCHW)
    assert 0 < theorem_radius(seen, found, y_B).median() < 1 / 255
    assert radius_B.max() < 1 / 255
    route_B = route_radius(seen, found, x_BCHW)
    marks = statuses(radius_B, route_B, torch.ones_like(y_B))
    assert set(marks) <= {Status.VACUOUS, Status.NOT_APPLICABLE}


def test_router_in_every_layer_is_refused(build: Any) -> None:
    model = build(router_scope="per_layer", ratio=0.125).double()
    with pytest.raises(NoBoundError, match="router_scope=per_layer"):
        constants(model, torch.rand(1, 3, 8, 8).double())


# --- theorem 5.4 --------------------------------------------------------------------------------


def test_radius_is_the_closed_form_on_a_linear_mixture() -> None:
    """The formula written out from the weights, class by class and expert by expert."""
    model, x_BCHW = mixture("all", affine=True), images(7)
    found, seen, y_B = proven(model, x_BCHW)
    std = model.normalize.std.flatten().repeat_interleave(SIZE**2)
    rows = [expert.body.head.weight.detach() / std for expert in model.experts]  # type: ignore[union-attr, operator]
    assert model.router is not None
    gate_rows = model.router.linear.weight.detach() / std  # type: ignore[union-attr, operator]
    p_BEK = model.experts_logits(x_BCHW).detach().softmax(2)
    a_BE = model.router_scores(x_BCHW).detach().softmax(1)
    want = []
    for image, y in enumerate(y_B.tolist()):
        radii = []
        for k in set(range(CLASSES)) - {y}:
            margin = sum(
                a_BE[image, i] * (p_BEK[image, i, y] - p_BEK[image, i, k]) for i in range(3)
            )
            slope = 0.0
            for i in range(3):
                r = max(float((gate_rows[i] - gate_rows[j]).abs().sum()) for j in range(3)) / 4
                wide = [
                    float((rows[i][c] - rows[i][other]).abs().sum())
                    for c in (y, k)
                    for other in range(CLASSES)
                ]
                slope += r + float(a_BE[image, i]) * max(wide) / 2
            radii.append(float(margin) / slope)
        want.append(min(radii))
    assert_close(theorem_radius(seen, found, y_B), torch.tensor(want, dtype=torch.float64))


def test_linear_classifier_has_the_distance_to_its_nearest_boundary() -> None:
    """One affine expert: the floor's radius is exact, ``min_k (z_y - z_k) / |W_y - W_k|_1``."""
    torch.manual_seed(2)
    model, x_BCHW = affine_network().double().eval(), images(5)
    found, seen, y_B = proven(model, x_BCHW)
    rows_KD = model.body.head.weight.detach() / model.normalize.std.flatten().repeat_interleave(16)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        z_BK = model(x_BCHW).logits
    gap_BK = z_BK.gather(1, y_B[:, None]) - z_BK
    want_B = (gap_BK / (rows_KD[y_B][:, None] - rows_KD).abs().sum(2)).nan_to_num(math.inf).amin(1)
    assert_close(floor_radius(seen, found, y_B), want_B, rtol=1e-8, atol=1e-11)
    assert (theorem_radius(seen, found, y_B) < want_B).all()


@pytest.mark.parametrize("kind", ["hard", "top", "all"])
def test_constants_of_differences_never_give_less_than_those_of_classes(kind: str) -> None:
    """And more where the router takes part: its term is not doubled."""
    model, x_BCHW = mixture(kind), images(50)
    found, seen, y_B = proven(model, x_BCHW)
    pairs, each = softmax_pairs(found.logits_EKK), softmax_each(found.logits_EKK)
    assert (pairs <= 2 * each.amax(1)[:, None, None] + 1e-12).all()
    differences_B = theorem_radius(seen, found, y_B)
    classes_B = theorem_radius_per_class(seen, found, y_B)
    assert (differences_B >= classes_B - 1e-12).all()
    assert (differences_B > 1.01 * classes_B).any() == (kind != "hard")
    assert (classes_B > 0).all()


@pytest.mark.parametrize("kind", ["hard", "top", "all"])
def test_floor_is_never_worse_than_the_theorem(kind: str) -> None:
    model, x_BCHW = mixture(kind), images(50)
    found, seen, y_B = proven(model, x_BCHW)
    theorem_B, floor_B = theorem_radius(seen, found, y_B), floor_radius(seen, found, y_B)
    assert (floor_B >= theorem_B.clamp(max=1) - 1e-9).all()
    assert (floor_B > 1.1 * theorem_B).any()


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("kind", ["hard", "top", "all"])
def test_floor_bounds_the_margin_of_every_image_nearby(kind: str, mix: Any) -> None:
    """At eps 0 it is the margin itself; beyond, no image that keeps its experts is below it."""
    model, x_BCHW = mixture(kind, mix=mix), images(60)
    found, seen, y_B = proven(model, x_BCHW)

    def mixed_margin(x: Tensor, seen: MixtureOutputs) -> Tensor:
        outputs = seen.logits_BEK if found.top_k == 1 else seen.outputs(found.mix)
        margin_BK = (seen.gates_BE[:, :, None] * margins(outputs, y_B)).sum(1)
        return margin_BK.scatter(1, y_B[:, None], math.inf).amin(1)

    zero_B = torch.zeros(len(x_BCHW)).double()
    at_once_B = margin_floor(seen, found, y_B, zero_B)
    assert_close(at_once_B, mixed_margin(x_BCHW, seen))
    for eps in (0.003, 0.03, 0.2):
        floor_B = margin_floor(seen, found, y_B, zero_B + eps)
        assert (floor_B < at_once_B).all()
        for seed in range(5):
            moved = (x_BCHW + eps * (2 * images(60, seed) - 1).sign()).clamp(0, 1)
            there = look(model, moved, found.top_k)
            same_B = (there.kept_BE == seen.kept_BE).all(1)
            assert same_B.any()
            assert (mixed_margin(moved, there) >= floor_B - 1e-12)[same_B].all()


def test_misclassified_image_has_no_radius() -> None:
    model, x_BCHW = mixture("all"), images(20)
    found, seen, y_B = proven(model, x_BCHW)
    other_B = (y_B + 1) % CLASSES
    for radius in (theorem_radius, theorem_radius_per_class, floor_radius):
        assert not radius(seen, found, other_B).any()


# --- the dual model -----------------------------------------------------------------------------


def test_dual_radius_is_the_formula_and_needs_the_robust_half_to_decide() -> None:
    model, x_BCHW = mixture("all", affine=True), images(30)
    found, seen, y_B = proven(model, x_BCHW)
    own_B, margin_BEK = (
        theorem_radius(seen, found, y_B),
        margins(seen.outputs("probabilities"), y_B),
    )
    assert_close(theorem_radius(seen, found, y_B, need=need_of_dual(1.0)), own_B)
    assert not theorem_radius(seen, found, y_B, need=need_of_dual(0.5)).any()
    alpha = 0.97
    margin_BK = (seen.gates_BE[:, :, None] * margin_BEK).sum(1)
    margin_BK = margin_BK.scatter(1, y_B[:, None], math.inf)
    slope_B = margin_BK.amin(1) / own_B  # K, where the nearest class is the only one that counts
    want_B = ((alpha * margin_BK.amin(1) - (1 - alpha)) / (alpha * slope_B)).clamp(min=0)
    found_B = theorem_radius(seen, found, y_B, need=need_of_dual(alpha))
    assert (found_B <= want_B + 1e-12).all()
    assert (found_B > 0).any()
    assert torch.isclose(found_B, want_B)[found_B > 0].any()
    with pytest.raises(ValueError, match="alpha must be above 0 and at most 1, got 0"):
        need_of_dual(0)


def test_no_standard_half_breaks_the_dual_model_inside_its_radius() -> None:
    """Against the worst F_S that there is: all its probability on the runner-up."""
    model, x_BCHW = mixture("all"), images(60)
    found, seen, y_B = proven(model, x_BCHW)
    alpha = 0.97
    radius_B = floor_radius(seen, found, y_B, need=need_of_dual(alpha))
    assert (radius_B > 0).float().mean() > 0.3
    assert (radius_B <= floor_radius(seen, found, y_B)).all()
    for seed in range(100):
        corner = (2 * images(60, seed) - 1).sign()
        moved = (x_BCHW + 0.9999 * radius_B.view(-1, 1, 1, 1) * corner).clamp(0, 1)
        with torch.no_grad():
            p_BK = model(moved).logits.softmax(1)
        own_B = alpha * p_BK.gather(1, y_B[:, None])[:, 0]
        other_B = (1 - alpha) + alpha * p_BK.scatter(1, y_B[:, None], -1).amax(1)
        assert (own_B > other_B)[radius_B > 0].all()


def test_dual_of_mixed_logits_is_refused() -> None:
    model, x_BCHW = mixture("all", mix="logits"), images(2)
    found, seen, y_B = proven(model, x_BCHW)
    with pytest.raises(ValueError, match="need must be 0 where logits are mixed"):
        floor_radius(seen, found, y_B, need=0.1)


# --- routes -------------------------------------------------------------------------------------


def test_distance_to_a_plane_is_the_closed_form_without_the_box_and_more_with_it() -> None:
    torch.manual_seed(0)
    normal_D, x_BD = torch.randn(40).double(), torch.rand(200, 40).double()
    gap_B = 12 * torch.rand(200).double()
    free_B = plane_distance(x_BD, normal_D, gap_B, box=False)
    assert_close(free_B, gap_B / normal_D.abs().sum())
    boxed_B = plane_distance(x_BD, normal_D, gap_B)
    assert (boxed_B >= free_B - 1e-15).all()
    assert (boxed_B > 1.05 * free_B).any()

    def fall(eps_B: Tensor) -> Tensor:
        """The most that the gap can fall by, the adversary written out."""
        moved = (x_BD - eps_B[:, None] * normal_D.sign()).clamp(0, 1)
        return (x_BD - moved) @ normal_D

    reached_B = boxed_B.isfinite()
    assert reached_B.any()
    assert not reached_B.all()
    assert_close(fall(boxed_B)[reached_B], gap_B[reached_B])
    assert (fall(torch.ones(200).double()) < gap_B)[~reached_B].all()
    grey = torch.full((1, 40), 0.5).double()
    near = plane_distance(grey, normal_D, gap_B[:1] / 100)
    assert_close(near, gap_B[:1] / 100 / normal_D.abs().sum(), msg="the box is out of reach")


@pytest.mark.parametrize("kind", ["hard", "top"])
def test_route_holds_up_to_its_radius_and_not_beyond(kind: str) -> None:
    """The corner that the closest plane names is the worst: the experts change just behind it."""
    model, x_BCHW = mixture(kind), images(60)
    found, seen, _ = proven(model, x_BCHW)
    radius_B = route_radius(seen, found, x_BCHW)
    assert found.router_ED is not None
    assert (radius_B >= route_radius(seen, found, x_BCHW, box=False) - 1e-12).all()
    sound_B = route_radius(seen, replace(found, router_ED=None), x_BCHW)
    assert_close(sound_B, route_radius(seen, found, x_BCHW, box=False))
    changed = {0.9999: torch.zeros(60).bool(), 1.0001: torch.zeros(60).bool()}
    for one in range(3):
        for other in range(3):
            sign = (found.router_ED[other] - found.router_ED[one]).sign().view(3, SIZE, SIZE)
            for factor in changed:
                step = factor * radius_B.nan_to_num(posinf=1.0).view(-1, 1, 1, 1) * sign
                there = look(model, (x_BCHW + step).clamp(0, 1), found.top_k)
                changed[factor] |= (there.kept_BE != seen.kept_BE).any(1)
    assert not changed[0.9999].any()
    assert torch.equal(changed[1.0001], radius_B.isfinite())


def test_gates_that_leave_nobody_out_never_jump() -> None:
    model, x_BCHW = mixture("all"), images(4)
    found, seen, _ = proven(model, x_BCHW)
    assert route_radius(seen, found, x_BCHW).isinf().all()


@pytest.mark.parametrize("kind", ["hard", "top"])
def test_jumping_gate_near_a_tie_is_not_applicable(kind: str) -> None:
    """An image on the plane between the last expert that takes part and the first that does not."""
    model, x_BCHW = mixture(kind), images(40)
    found, seen, y_B = proven(model, x_BCHW)
    assert found.router_ED is not None
    order = seen.scores_BE.argsort(dim=1, descending=True)
    kept_B, out_B = order[:, found.top_k - 1], order[:, found.top_k]
    normal_BD = found.router_ED[kept_B] - found.router_ED[out_B]
    gap_B = seen.scores_BE.gather(1, kept_B[:, None]) - seen.scores_BE.gather(1, out_B[:, None])
    share_B1 = (gap_B - 1e-4) / normal_BD.abs().sum(1, keepdim=True)
    near = x_BCHW - (share_B1 * normal_BD.sign()).view_as(x_BCHW)
    inside_B = ((near >= 0) & (near <= 1)).flatten(1).all(1)
    assert inside_B.sum() >= 3
    for images_B, want in ((near[inside_B], True), (x_BCHW, False)):
        found, seen, y_B = proven(model, images_B)
        route_B = route_radius(seen, found, images_B)
        radius_B = torch.minimum(floor_radius(seen, found, y_B), route_B)
        marks = statuses(radius_B, route_B, torch.ones_like(y_B, dtype=torch.bool))
        assert all(mark == Status.NOT_APPLICABLE for mark in marks) == want
        assert want or Status.CERTIFIED in marks


def test_status_says_what_a_radius_is_worth() -> None:
    radius_B = torch.tensor([0.1, 0.001, 0.0001, 0.1])
    route_B = torch.tensor([0.2, math.inf, 0.0001, 0.2])
    right_B = torch.tensor([True, True, True, False])
    want = [Status.CERTIFIED, Status.VACUOUS, Status.NOT_APPLICABLE, Status.WRONG]
    assert statuses(radius_B, route_B, right_B) == want


def test_dense_transformer_has_no_certificate() -> None:
    model = BACKBONES["vit"](num_experts=1, ratio=0.34).build(4, 8).double().eval()
    with pytest.raises(NoBoundError, match="attention has no global"):
        constants(model, torch.rand(1, 3, 8, 8).double())
