"""Agreement of an exported model with its network: outputs, routes, and accuracy under attack.

Shapes: B images, E experts, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.exported_model import ExportedModel
from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing import Routed
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures import MEASURES, Evaluation, Measure
from pipeline.measures.base import is_correct
from pipeline.seeding import ImageNoise

ATTACKED, STEPS = 200, 50  # images, and gradients of PGD
TOLERANCE = 1e-3  # of the largest logit: fp32 sums in another order stay below 1e-4
TIE = 1e-4  # gap of two router scores below which either expert is right
SLACK = 0.02  # of accuracy: the sign of a gradient near zero may differ, and a path with it


class DisagreementError(Exception):
    """An exported model differs from the network that it was made from."""


@dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        images: How many.
        gap: Largest difference of logits on clean and attacked images, over the largest logit.
        network, exported: Accuracy by attack, of either model.
    """

    images: int
    gap: float
    network: Mapping[str, float]
    exported: Mapping[str, float]


class ExportedNetwork(Network):
    """An exported model in the form that attacks take; frozen, with the true gradient."""

    def __init__(self, exported: ExportedModel, model: Network):
        nn.Module.__init__(self)
        self.exported, self.gate_gradient = exported, False
        self.num_experts, self.num_layers = model.num_experts, model.num_layers

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Classify pixels in [0, 1]; scores of a whole program are its route as one-hot."""
        logits_BK, route = self.exported.run(x_BCHW)
        if self.exported.tree["kind"] == "whole":
            one_hot = nn.functional.one_hot(route, self.num_experts).to(x_BCHW.dtype)
            return Routed(logits_BK, one_hot, route)
        return Routed(logits_BK, self.exported.scores(x_BCHW), route)

    def along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Classify along a given route (B,)."""
        self.check_route(x_BCHW, route)
        return self.exported.along(x_BCHW, route)

    def router_scores(self, x_BCHW: Tensor) -> Tensor:
        """Score the experts (B, E)."""
        return self.exported.scores(x_BCHW)


def check_agreement(
    model: Network,
    exported: ExportedModel,
    images: Images,
    evaluation: Evaluation,
    *,
    seed: int,
    steps: int = STEPS,
) -> Agreement:
    """Attack network and exported model alike, with PGD and, where it has pathways, forced routes.

    Both are compared on the clean images, and on those that either attack made.

    Raises:
        DisagreementError: Logits, routes or accuracy differ.
    """
    reference, other = fold(model).eval(), ExportedNetwork(exported, model)
    x_BCHW, y_B = to_float(images.pixels_NCHW).contiguous(), images.labels_N
    gap = compare(reference, other, x_BCHW, "clean images")
    accuracy: dict[str, tuple[float, float]] = {
        "sa": (share(reference, x_BCHW, y_B), share(other, x_BCHW, y_B))
    }
    for name, measure in attacks(evaluation, model, steps).items():
        makers = [reference]
        if name == "ra_pgd" or exported.tree["kind"] != "whole":
            makers.append(other)
        shares = []
        for maker in makers:
            noise = ImageNoise(seed, torch.arange(len(y_B)))
            found = measure(maker, x_BCHW, y_B, noise)
            gap = max(gap, compare(reference, other, found.x_adv, f"images of {name}"))
            shares.append(float(found.correct_B.float().mean()))
        if len(shares) == 1:  # a whole program has no pathway to attack: images of the network
            shares.append(share(other, found.x_adv, y_B))
        accuracy[name] = shares[0], shares[1]
    for name, (wanted, got) in accuracy.items():
        if abs(wanted - got) > SLACK:
            raise DisagreementError(
                f"{name} of the exported model is {got:.4f}, of the network {wanted:.4f}"
            )
    return Agreement(
        len(y_B),
        gap,
        {name: pair[0] for name, pair in accuracy.items()},
        {name: pair[1] for name, pair in accuracy.items()},
    )


def check_outputs(model: Network, exported: ExportedModel, images: Images) -> float:
    """Compare logits and routes on clean images alone; return the largest difference of logits.

    Raises:
        DisagreementError: Logits or routes differ.
    """
    x_BCHW = to_float(images.pixels_NCHW).contiguous()
    return compare(fold(model).eval(), ExportedNetwork(exported, model), x_BCHW, "clean images")


def attacks(evaluation: Evaluation, model: Network, steps: int) -> dict[str, Measure]:
    """Make PGD, and PGD along forced routes for a model that routes."""
    names = ("ra_pgd", "ra_forced") if model.num_experts > 1 else ("ra_pgd",)
    return {name: MEASURES[name](attack=evaluation.attack(steps)) for name in names}


def share(model: Network, x_BCHW: Tensor, y_B: Tensor) -> float:
    """Return the accuracy."""
    return float(is_correct(model, x_BCHW, y_B).float().mean())


@torch.no_grad()
def compare(reference: Network, other: Network, x_BCHW: Tensor, what: str) -> float:
    """Return the largest difference of logits over the largest logit.

    Raises:
        DisagreementError: It is too large, or an image goes to another expert without a tie.
    """
    wanted, found = reference(x_BCHW), other(x_BCHW)
    sure_B = torch.ones(len(x_BCHW), dtype=torch.bool)
    if wanted.router.shape[-1] > 1:
        top = wanted.router.topk(2, -1).values
        sure_B = (top[..., 0] - top[..., 1] > TIE).view(len(x_BCHW), -1).all(1)
    moved = (wanted.route != found.route).view(len(x_BCHW), -1).any(1) & sure_B
    if bool(moved.any()):
        raise DisagreementError(
            f"the exported model sends {int(moved.sum())} of {len(x_BCHW)} {what} to another expert"
        )
    gap_B = (wanted.logits - found.logits)[sure_B].abs()
    gap = float(gap_B.max() / wanted.logits.abs().max().clamp(min=1)) if len(gap_B) else 0.0
    if not gap <= TOLERANCE:
        raise DisagreementError(
            f"logits of the exported model differ by {gap:.1e} of the largest on {what}, "
            f"at most {TOLERANCE:.0e} is rounding"
        )
    return gap
