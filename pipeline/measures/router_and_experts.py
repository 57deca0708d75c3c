"""Attacks on one component, judged on the whole model (RT-ER, arXiv:2502.06832, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images
from pipeline.measures.gradient_attack import Clean
from pipeline.optimization.losses import cross_entropy_per_image

TINY, CHANGED = 1e-12, 0.25  # the lead at which a decision has changed, in deviations of the scores


@dataclass(frozen=True, kw_only=True)
class ExpertAttack:
    """RA-E: PGD on the cross-entropy with the clean image's routing; the router is left out.

    That is the clean route; of a mixture with soft gates, the weights of the clean image; of a
    V-MoE the scores of every token in every layer, see ``moe.token_network``.
    """

    title: ClassVar[str] = "RA, experts attacked, clean route"
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            scores = model.routing_scores(x_BCHW)

        def objective(x: Tensor, index: Tensor) -> Tensor:
            return cross_entropy_per_image(model.held(x, scores[index]), y_B[index])

        before = Clean()(model, x_BCHW, y_B, noise)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class RouterAttack:
    """RA-R: PGD on the lead of another expert over the one that the clean image takes.

    With several decisions per image, each counts by its own scale, and until it has changed.
    """

    title: ClassVar[str] = "RA, router attacked"
    cost: ClassVar[float] = 0.5
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            clean = model(x_BCHW)
        before = Clean()(model, x_BCHW, y_B, noise)
        if model.num_experts == 1:  # a dense net has no router to attack
            return before
        route_BL1 = clean.route.reshape(len(x_BCHW), -1, 1)
        spread_BL = clean.router.reshape(*route_BL1.shape[:2], -1).std(-1).clamp(min=TINY)

        def objective(x: Tensor, index: Tensor) -> Tensor:
            scores_ALE = model.router_scores(x).reshape(len(x), *spread_BL.shape[1:], -1)
            own_AL1 = scores_ALE.gather(2, route_BL1[index])
            others_ALE = scores_ALE.scatter(2, route_BL1[index], -torch.inf)
            lead_AL = (others_ALE.amax(2) - own_AL1.squeeze(2)) / spread_BL[index]
            height_A: Tensor = lead_AL.clamp(max=CHANGED).sum(1)
            return height_A

        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)
