"""Measures on whole networks as experts, where the robust accuracy is known to be 0.

Shapes: B images.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.fold_batchnorm import fold
from moe.mixture_of_networks import Gate, Mix, Mixture
from moe.network import Network
from moe.routing import Route, Routing
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.measures import MEASURES
from pipeline.seeding import ImageNoise
from tests.helpers.analytic import EPS, QuadrantExperts, SignRouter, route_flip, route_flip_images

TRUE_GRADIENT = ("ra_pgd", "ra_pgd_margin", "ra_apgd", "ra_apgd_dlr", "ra_apgd_t")


class Quadrants(nn.Module):
    """One of the two experts, as a body of its own."""

    def __init__(self, expert: int):
        super().__init__()
        self.both, self.expert = QuadrantExperts(), expert

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        every_B = torch.full((len(x_BCHW),), self.expert)
        route = Route.fixed(every_B, x_BCHW.new_zeros(len(x_BCHW), 2))
        logits_BK: Tensor = self.both(x_BCHW, Routing(route))
        return logits_BK


def mixture(gate: Gate, mix: Mix) -> Mixture:
    """``route_flip`` as a mixture of two networks."""
    experts = [
        Network(Quadrants(e), None, normalize=nn.Identity(), num_experts=1)  # type: ignore[arg-type]
        for e in range(2)
    ]
    top_k = 1 if gate == "hard" else 2
    return Mixture(experts, SignRouter(20.0), gate=gate, top_k=top_k, mix=mix).eval()


def standing(name: str, model: Network, norm: Any) -> float:
    """Share of images that stand against a measure, at the radius where none can."""
    images = route_flip_images(12)
    attack = PGD(eps=EPS[norm], step_size=EPS[norm] / 4, steps=30, norm=norm)
    measure = MEASURES[name](attack=attack)
    noise = ImageNoise(0, torch.arange(12))
    found = measure(fold(model), to_float(images.pixels_NCHW), images.labels_N, noise)
    return float(found.correct_B.float().mean())


def test_hard_mixture_is_the_network_of_which_the_answers_are_known() -> None:
    x_BCHW = to_float(route_flip_images(12).pixels_NCHW)
    found, want = mixture("hard", "logits")(x_BCHW), route_flip()(x_BCHW)
    for own, other in zip(found, want, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("name", [*TRUE_GRADIENT, "ra_expert", "ra_router", "ra_forced_sweep"])
def test_hard_gates_hide_the_flip_from_the_true_gradient_alone(name: str, mix: Mix) -> None:
    blind = name in (*TRUE_GRADIENT, "ra_expert")
    assert standing(name, mixture("hard", mix), "linf") == float(blind)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", TRUE_GRADIENT)
def test_soft_gates_show_the_flip_to_every_attack_by_the_true_gradient(
    name: str, norm: str
) -> None:
    assert standing(name, mixture("softmax", "probabilities"), norm) == 0.0


def test_soft_gates_stand_where_the_routing_is_held() -> None:
    assert standing("ra_expert", mixture("softmax", "probabilities"), "linf") == 1.0
    assert standing("sa", mixture("softmax", "probabilities"), "linf") == 1.0
    assert standing("ra_noise", mixture("softmax", "probabilities"), "linf") == 1.0
