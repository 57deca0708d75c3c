"""An attack that drives each image to the expert that fails on it.

Hard top-1 routing hides the gradient of every expert that was not chosen; an attacker who aims at
one expert at a time, and pulls the router there, does not depend on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Walker
from pipeline.attacks.apgd import like
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, untouched
from pipeline.optimization.losses import margin_per_image

SWEEP = (1.0, 0.3, 3.0)


def check_weights(weights: tuple[float, ...]) -> None:
    """Refuse weights with which nothing is attacked, or the wrong way round.

    Raises:
        ValueError: There is none, or one is negative.
    """
    if not weights or not all(weight >= 0 for weight in weights):
        raise ValueError(f"weights must be one or more numbers of at least 0, got {weights}")


@dataclass(frozen=True, kw_only=True)
class ForcedRoute:
    """RA-forced: for each expert e, PGD on ``margin of e - weight * max_j relu(r_j - r_e)``.

    The penalty is the gap that keeps the router from e (zero once it is there, and without a
    gradient then). Success is judged on the deployed model; an image stands if it stands against
    every e. With ``per_layer`` routers e is the expert of every layer, and the gaps are summed; of
    a V-MoE it is that of every token too, and the gap of a layer is the mean over its tokens.

    Attributes:
        weights: Of the gap, in logits of the classifier per logit of the router, one attack each;
            what stands against one meets the next. No weight is right for all networks: it has to
            outweigh the margin's gradient where that pulls the image away from e's region.

    Raises:
        ValueError: There is no weight, or one is negative.
    """

    attack: Walker = PGD(steps=50)
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        with torch.no_grad():
            clean = model(x_BCHW)
        experts = clean.router.shape[-1]
        for weight in self.weights if experts > 1 else self.weights[:1]:  # no router, no gap
            for expert in range(experts):
                route = torch.full_like(clean.route, expert)

                def objective(
                    x: Tensor,
                    index: Tensor,
                    e: int = expert,
                    to: Tensor = route,
                    w: float = weight,
                ) -> Tensor:
                    scores = model.router_scores(x)
                    gap_B = (scores.amax(-1) - scores[..., e]).reshape(len(x), -1).sum(1)
                    gap_B = gap_B / model.tokens
                    return margin_per_image(model.along(x, to[index]), y_B[index]) - w * gap_B

                outcome = break_images(self.attack, model, objective, outcome, x_BCHW, y_B, noise)
        return outcome


@dataclass(frozen=True, kw_only=True)
class ForcedRouteSweep:
    """RA-forced with PGD for each of several weights of the gap.

    Attributes:
        weights: As in ``ForcedRoute``, in the order in which they are tried.
    """

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

    attack: PGD = PGD(steps=100)
    weights: tuple[float, ...] = SWEEP

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        forced = ForcedRoute(attack=like(self.attack), weights=self.weights)
        return forced(model, x_BCHW, y_B, noise)
