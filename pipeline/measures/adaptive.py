"""An attack on classifier and router at once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, untouched
from pipeline.measures.forced_route import check_weights
from pipeline.optimization.losses import cross_entropy_per_image


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """RA under PGD on ``CE(model, y) + weight * CE(router, its clean decision)``.

    The objective of AdvMoE's released evaluation at weight 6 (Zhang et al., ICCV 2023,
    arXiv:2308.10110), here one of several: the worst over the weights counts.

    Attributes:
        weights: Of the router's term, one attack each; what stands against one meets the next. A
            dense net, which has no router, meets one attack.

    Raises:
        ValueError: There is no weight, or one is negative.
    """

    title: ClassVar[str] = "RA, classifier and router at once"
    cost: ClassVar[float] = 2.0
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)
    weights: tuple[float, ...] = (0.0, 1.0, 6.0)

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        with torch.no_grad():
            route = model(x_BCHW).route
        for weight in self.weights if model.num_experts > 1 else self.weights[:1]:

            def objective(x: Tensor, index: Tensor, w: float = weight) -> Tensor:
                routed = model(x)
                away_B = cross_entropy_per_image(routed.router, route[index])
                return cross_entropy_per_image(routed.logits, y_B[index]) + w * away_B

            outcome = break_images(self.attack, model, objective, outcome, x_BCHW, y_B, noise)
        return outcome
