"""An attack that drives each image to the expert that fails on it.

Hard top-1 routing hides the gradient of every expert that was not chosen; an attacker who aims at
one expert at a time, and pulls the router there, does not depend on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Objective, Walker
from pipeline.attacks.apgd import like
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, slope_of, untouched
from pipeline.optimization.losses import margin_per_image

SWEEP = (1.0, 0.3, 3.0)
CAP = 0.25  # of the radius


def check_weights(weights: tuple[float, ...]) -> None:
    """Refuse weights with which nothing is attacked, or the wrong way round.

    Raises:
        ValueError: There is none, or one is negative.
    """
    if not weights or not all(weight >= 0 for weight in weights):
        raise ValueError(f"weights must be one or more numbers of at least 0, got {weights}")


@dataclass(frozen=True, kw_only=True)
class ForcedRoute:
    """RA-forced: for each expert e, PGD on ``min(m_e, c) - weight * max_j relu(r_j - r_e)``.

    ``m_e`` is the margin of e as a classifier of its own; the penalty is the gap that keeps the
    router from e (zero once it is there, and without a gradient then). Both are counted in pixels:
    divided by the norm of their gradient at the clean image (L1 for L-inf, L2 for L2), which is how
    far the image is from where they cross zero, to first order. So no scale of the logits or of the
    router's scores, which the deployed function of a hard gate does not have, changes the attack.
    The margin counts up to ``c`` of a quarter of the radius: an image that e misclassifies is to go
    to e, not further beyond. Success is judged on the deployed model; an image stands if it stands
    against every e. With ``per_layer`` routers e is the expert of every layer, and the gaps are
    summed; of a V-MoE it is that of every token too, and the gap of a layer is the mean over its
    tokens. There routes near the image's own are forced as well, see ``targeted_routes``.

    Attributes:
        weights: Of the gap over the margin, one attack each; what stands against one meets the
            next. No weight is right for all networks: it has to outweigh the margin's gradient
            where that pulls the image away from e's region.

    Raises:
        ValueError: There is no weight, or one is negative.
    """

    title: ClassVar[str] = "RA, forced route"
    cost: ClassVar[float] = 2.0
    routed: ClassVar[bool] = True
    attack: Walker = PGD(steps=50)
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        targets = targeted_routes(model, x_BCHW)
        for weight in self.weights if model.num_experts > 1 else self.weights[:1]:  # no gap
            for route in targets:
                height = towards(model, self.attack, route, x_BCHW, y_B, weight)
                outcome = break_images(self.attack, model, height, outcome, x_BCHW, y_B, noise)
        return outcome


def targeted_routes(model: Network, x_BCHW: Tensor) -> list[Tensor]:
    """List the routes that are forced: (B,), or (B, L) where there are several decisions.

    Each expert throughout; and with several decisions the image's own route with the second choice
    in the eighth, quarter, half or all of its decisions that are the nearest to a change, since the
    routes that images do take are hardly ever those of one expert.
    """
    with torch.no_grad():
        clean = model(x_BCHW)
    experts = clean.router.shape[-1]
    routes = [torch.full_like(clean.route, expert) for expert in range(experts)]
    if clean.route.dim() == 1 or experts == 1:
        return routes
    best = clean.router.topk(2, dim=-1)
    nearest_BL = (best.values[..., 0] - best.values[..., 1]).argsort(1)
    count = nearest_BL.shape[1]
    for changed in sorted({max(1, count // part) for part in (8, 4, 2, 1)}):
        rows_BM = nearest_BL[:, :changed]
        second_BM = best.indices[..., 1].gather(1, rows_BM)
        routes.append(clean.route.scatter(1, rows_BM, second_BM))
    return routes


def towards(
    model: Network,
    attack: Walker,
    route: Tensor,
    x_BCHW: Tensor,
    y_B: Tensor,
    weight: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make what ``ForcedRoute`` climbs for one route, of the images of a batch at an index."""
    route_BL1 = route.reshape(len(route), -1, 1)

    def margin(x: Tensor, index: Tensor) -> Tensor:
        return margin_per_image(model.along(x, route[index]), y_B[index])

    def lead(x: Tensor, index: Tensor) -> Tensor:
        """By how much the best other expert leads, negative once the route is there: (B, L)."""
        scores = model.router_scores(x)
        scores_BLE, own_BL1 = scores.reshape(len(x), -1, scores.shape[-1]), route_BL1[index]
        if scores.shape[-1] == 1:
            return torch.zeros_like(scores_BLE[..., 0])
        others_BLE = scores_BLE.scatter(2, own_BL1, -torch.inf)
        return others_BLE.amax(2) - scores_BLE.gather(2, own_BL1).squeeze(2)

    every_B = torch.arange(len(y_B), device=y_B.device)
    unit_B = steepness(lambda x: margin(x, every_B), x_BCHW, attack.norm)
    gap_unit_B = steepness(lambda x: lead(x, every_B).sum(1) / model.tokens, x_BCHW, attack.norm)
    most = CAP * attack.eps

    def height(x: Tensor, index: Tensor) -> Tensor:
        gap_B = lead(x, index).relu().sum(1) / model.tokens
        margin_B = (margin(x, index) / unit_B[index]).clamp(max=most)
        return margin_B - weight * gap_B / gap_unit_B[index]

    return height


def steepness(height: Objective, x_BCHW: Tensor, norm: str) -> Tensor:
    """Change of a height over the largest change of a pixel that it takes, (B,); 1 where flat."""
    rows_BD = slope_of(height, x_BCHW).flatten(1)
    size_B = rows_BD.abs().sum(1) if norm == "linf" else rows_BD.norm(dim=1)
    return torch.where((size_B > 0) & size_B.isfinite(), size_B, 1.0)


@dataclass(frozen=True, kw_only=True)
class ForcedRouteSweep:
    """RA-forced with PGD for each of several weights of the gap.

    Attributes:
        weights: As in ``ForcedRoute``, in the order in which they are tried.
    """

    title: ClassVar[str] = "RA, forced route, three weights"
    cost: ClassVar[float] = 6.0
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)
    weights: tuple[float, ...] = SWEEP

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        return ForcedRoute(attack=self.attack, weights=self.weights)(model, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class ForcedRouteAPGD:
    """RA-forced with APGD, whose step size fits itself to each weight of the gap.

    Attributes:
        weights: As in ``ForcedRoute``, in the order in which they are tried.
    """

    title: ClassVar[str] = "RA, forced route, APGD"
    cost: ClassVar[float] = 6.0
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=100)
    weights: tuple[float, ...] = SWEEP

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        forced = ForcedRoute(attack=like(self.attack), weights=self.weights)
        return forced(model, x_BCHW, y_B, noise)
