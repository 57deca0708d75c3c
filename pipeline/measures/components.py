"""Attacks on one component, judged on the whole model (RT-ER, arXiv:2502.06832, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.losses import cross_entropy_per_image
from pipeline.measures.attacked import Attacked, is_correct


@dataclass(frozen=True, kw_only=True)
class ExpertAttack:
    """RA-E: PGD on the cross-entropy along the clean image's route; the router is left out."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            clean = model(x_BCHW)
        alive = (clean.logits.argmax(1) == y_B).nonzero().squeeze(1)
        return _judged(
            self.attack,
            lambda x: cross_entropy_per_image(model.along(x, clean.route[alive]), y_B[alive]),
            (model, x_BCHW, y_B, noise),
            alive,
        )


@dataclass(frozen=True, kw_only=True)
class RouterAttack:
    """RA-R: PGD on the cross-entropy of the router against its own clean decision."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            clean = model(x_BCHW)
        alive = (clean.logits.argmax(1) == y_B).nonzero().squeeze(1)
        if clean.router.shape[-1] == 1:  # a dense net has no router to attack
            return Attacked(clean.logits.argmax(1) == y_B, x_BCHW)
        return _judged(
            self.attack,
            lambda x: cross_entropy_per_image(model.router_scores(x), clean.route[alive]),
            (model, x_BCHW, y_B, noise),
            alive,
        )


def _judged(
    attack: PGD, objective: object, on: tuple[Network, Tensor, Tensor, Draw], alive: Tensor
) -> Attacked:
    """Attack the images at ``alive`` to the end of each start, and judge the deployed model then.

    An image keeps the first attack that broke it.
    """
    model, x_BCHW, y_B, noise = on
    x_adv, correct_B = x_BCHW.clone(), torch.zeros_like(y_B, dtype=torch.bool)
    correct_B[alive] = True
    for _ in range(attack.restarts if len(alive) else 0):
        assert callable(objective)
        start = attack.begin(x_BCHW, noise)[alive]
        moved = attack.ascend(objective, x_BCHW[alive], start, attack.steps)
        standing_A = correct_B[alive]
        x_adv[alive] = torch.where(standing_A.view(-1, 1, 1, 1), moved, x_adv[alive])
        correct_B[alive] = standing_A & is_correct(model, moved, y_B[alive])
    return Attacked(correct_B, x_adv)
