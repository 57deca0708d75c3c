"""Every attack where the answer is known: a linear classifier, and a mixture with a flip of route.

Shapes: B images, K classes, P pixels, CHW channels and sides.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing import Routing
from pipeline.attacks.apgd import APGD
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.measures import FLOORS, MEASURES, PACKAGED, Transfer
from pipeline.measures.fixed_route import OneExpert, per_expert
from pipeline.measures.forced_route import ForcedRoute, ForcedRouteAPGD
from pipeline.optimization.losses import margin_per_image
from pipeline.seeding import ImageNoise
from tests.helpers.analytic import EPS, route_flip, route_flip_images

NO_ATTACK = ("sa", "ra_noise", "ra_router")  # on the classifier
CLASSIFIER = [
    n
    for n in MEASURES
    if n not in (*NO_ATTACK, *PACKAGED, "ra_grid", "ra_queries", "ra_gate_queries")
]
BLIND = ("sa", "ra_pgd", "ra_pgd_margin", "ra_expert", "ra_apgd", "ra_apgd_dlr", "ra_apgd_t")
SEEING = ("ra_router", "ra_forced_apgd", "ra_surrogate", "ra_surrogate_apgd", "ra_adaptive")


class Linear(nn.Module):
    """Logits ``W x + b``."""

    def __init__(self, classes: int):
        super().__init__()
        draws = torch.Generator().manual_seed(classes)
        self.w_KP = nn.Parameter(torch.randn(classes, 48, generator=draws))
        self.b_K = nn.Parameter(-0.5 * self.w_KP.detach().sum(1))  # even at grey

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        logits_BK: Tensor = x_BCHW.flatten(1) @ self.w_KP.T + self.b_K
        return logits_BK


def linear(classes: int) -> Network:
    return Network(Linear(classes), None, normalize=nn.Identity(), num_experts=1).eval()  # type: ignore[arg-type]


def inner_images(count: int) -> Tensor:
    """Images so far from 0 and 1 that the range does not bind."""
    draws = torch.Generator().manual_seed(0)
    return 0.4 + 0.2 * torch.rand(count, 3, 4, 4, generator=draws)


def exact_radius(model: Network, x_BCHW: Tensor, y_B: Tensor, norm: str) -> Tensor:
    """``min_j (z_y - z_j) / |w_y - w_j|``, in the dual norm: L1 for L-inf, L2 for L2."""
    w_KP = model.body.w_KP.detach()
    assert isinstance(w_KP, Tensor)
    logits_BK = model(x_BCHW).logits.detach()
    lead_BK = logits_BK.gather(1, y_B[:, None]) - logits_BK
    gap_BKP = w_KP[y_B][:, None] - w_KP
    slope_BK = gap_BKP.abs().sum(2) if norm == "linf" else gap_BKP.norm(dim=2)
    radius_BK = (lead_BK / slope_BK).scatter(1, y_B[:, None], float("inf"))
    return radius_BK.amin(1)


def assert_breaks_what_can_be_broken(name: str, classes: int, norm: Any) -> None:
    model, x_BCHW = linear(classes), inner_images(60)
    y_B = model(x_BCHW).logits.argmax(1)
    radius_B = exact_radius(model, x_BCHW, y_B, norm)
    eps = float(radius_B.median())
    attack = PGD(eps=eps, step_size=eps / 8, steps=60, norm=norm)
    source = ImageNoise(0, torch.arange(60))
    correct_B = MEASURES[name](attack=attack)(fold(model), x_BCHW, y_B, source).correct_B
    assert not correct_B[radius_B < 0.98 * eps].any()
    assert correct_B[radius_B > 1.0001 * eps].all()
    assert 20 < correct_B.sum() < 40


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", CLASSIFIER)
def test_attack_breaks_a_linear_classifier_of_two_classes_at_its_exact_radius(
    name: str, norm: Any
) -> None:
    assert_breaks_what_can_be_broken(name, 2, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [3, 4, 6])
def test_targeted_attack_finds_the_nearest_class_of_many(classes: int, norm: Any) -> None:
    assert_breaks_what_can_be_broken("ra_apgd_t", classes, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_objective_of_a_linear_classifier_rises_by_eps_times_the_dual_norm(norm: Any) -> None:
    """In L-inf the margin rises to ``margin + eps |w_i - w_j|_1``, in L2 by the L2 norm."""
    model, x_BCHW = linear(2), inner_images(20)
    y_B, eps = model(x_BCHW).logits.argmax(1), 0.05
    gap_P = (model.body.w_KP[0] - model.body.w_KP[1]).detach()
    rise = eps * float(gap_P.abs().sum() if norm == "linf" else gap_P.norm())
    for attack in (
        PGD(eps=eps, step_size=eps / 8, steps=60, norm=norm),
        APGD(eps=eps, steps=60, norm=norm),
    ):
        noise = ImageNoise(0, torch.arange(20))
        found = attack(lambda x: margin_per_image(model(x).logits, y_B), x_BCHW, noise)
        before_B = margin_per_image(model(x_BCHW).logits, y_B)
        after_B = margin_per_image(model(found).logits, y_B)
        torch.testing.assert_close(after_B - before_B, torch.full((20,), rise), rtol=0.02, atol=0)


# The mixture whose robust accuracy is 0


@pytest.fixture(scope="module", params=["linf", "l2"])
def flip(request: pytest.FixtureRequest) -> Any:
    """Run a measure on the mixture: the share that stands, at the radius where none can."""
    norm, images = request.param, route_flip_images(16)
    x_BCHW, y_B, model = to_float(images.pixels_NCHW), images.labels_N, fold(route_flip())
    attack = PGD(eps=EPS[norm], step_size=EPS[norm] / 4, steps=50, norm=norm)

    def share(kind: Any, **settings: Any) -> float:
        measure = kind(attack=attack, **settings)
        found = measure(model, x_BCHW, y_B, ImageNoise(0, torch.arange(16)))
        return float(found.correct_B.float().mean())

    share.attack = attack  # type: ignore[attr-defined]
    return share


@pytest.mark.parametrize("name", BLIND)
def test_attack_that_leaves_the_route_alone_misses_the_flip(flip: Any, name: str) -> None:
    assert flip(MEASURES[name]) == 1.0


@pytest.mark.parametrize("name", SEEING)
def test_attack_that_reaches_the_router_finds_that_nothing_stands(flip: Any, name: str) -> None:
    assert flip(MEASURES[name]) == 0.0


def test_forced_route_is_found_in_both_norms_by_any_weight(flip: Any) -> None:
    """Counted in pixels and capped, the margin of expert 1 does not use up the radius."""
    for weight in (0.3, 1.0, 3.0):
        assert flip(ForcedRoute, weights=(weight,)) == 0.0
        assert flip(ForcedRouteAPGD, weights=(weight,)) == 0.0


def test_expert_0_alone_is_robust_and_expert_1_never_right(flip: Any) -> None:
    assert flip(OneExpert, expert=0) == 1.0
    assert flip(OneExpert, expert=1) == 0.0
    assert flip(MEASURES["ra_floor"]) == 0.0


def test_noise_and_images_of_the_expert_alone_do_not_flip_the_route(flip: Any) -> None:
    assert flip(MEASURES["ra_noise"]) == 1.0
    assert flip(Transfer, source=fold(route_flip())) == 1.0


def test_robust_accuracy_per_expert_is_a_column_each() -> None:
    images = route_flip_images(8)
    x_BCHW, model = to_float(images.pixels_NCHW), fold(route_flip())
    attack, noise = PGD(eps=0.1, steps=5), ImageNoise(0, torch.arange(8))
    table_BE = per_expert(model, x_BCHW, images.labels_N, attack, noise)
    assert table_BE.tolist() == [[True, False]] * 8


def test_floors_are_named_so_that_they_stay_out_of_the_worst_case() -> None:
    assert set(FLOORS) == {"ra_floor", "ra_each"}


@pytest.mark.parametrize(("expert", "shown"), [(2, "2"), (-1, "-1")])
def test_expert_that_is_not_there_is_refused(expert: int, shown: str) -> None:
    images = route_flip_images(4)
    measure = OneExpert(expert=expert)
    with pytest.raises(ValueError, match=f"expert must be in 0 to 1, got {shown}"):
        measure(
            fold(route_flip()),
            to_float(images.pixels_NCHW),
            images.labels_N,
            ImageNoise(0, torch.arange(4)),
        )
