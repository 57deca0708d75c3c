"""Attacks on one component, judged on the whole model (RT-ER, arXiv:2502.06832, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images
from pipeline.measures.gradient_attack import Clean
from pipeline.optimization.losses import cross_entropy_per_image


@dataclass(frozen=True, kw_only=True)
class ExpertAttack:
    """RA-E: PGD on the cross-entropy with the clean image's routing; the router is left out.

    That is the clean route; of a mixture with soft gates, the weights of the clean image; of a
    V-MoE the scores of every token in every layer, see ``moe.token_network``.
    """

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
    """RA-R: PGD on the cross-entropy of the router against its own clean decision."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            route = model(x_BCHW).route

        def objective(x: Tensor, index: Tensor) -> Tensor:
            return cross_entropy_per_image(model.router_scores(x), route[index])

        before = Clean()(model, x_BCHW, y_B, noise)
        if model.num_experts == 1:  # a dense net has no router to attack
            return before
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)
