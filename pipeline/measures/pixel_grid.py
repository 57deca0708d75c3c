"""8-bit pixel grid: attacked images as a file holds them.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Walker
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_by, is_correct, untouched
from pipeline.optimization.losses import margin_per_image

SLACK = 1e-3  # of a level: 8/255 is not quite eight levels as a float


def rounded(attack: Walker, x_adv: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return the nearest images on the grid that are in the ball; the clean ones are on it."""
    levels = (255 * x_adv).round()
    if attack.norm == "linf":
        low = (255 * (x_BCHW - attack.eps) - SLACK).ceil()
        high = (255 * (x_BCHW + attack.eps) + SLACK).floor()
        return levels.clamp(low, high).clamp(0, 255) / 255
    near = levels / 255
    far_B = (near - x_BCHW).flatten(1).norm(dim=1) > attack.eps
    inward = x_BCHW + ((255 * (x_adv - x_BCHW)).trunc() / 255)
    return torch.where(far_B.view(-1, 1, 1, 1), inward, near).clamp(0, 1)


def judged_on_grid(
    attack: Walker, model: Network, outcome: Attacked, x_BCHW: Tensor, y_B: Tensor
) -> Attacked:
    """Judge the images that are still robust on 8-bit pixels too: broken by either is broken.

    A gate or a layer that looks whether pixels are on the grid sees an attack by that alone, and
    any other may round it away.
    """
    rows_A = outcome.correct_B.nonzero().squeeze(1)
    if not len(rows_A):
        return outcome
    near = rounded(attack, outcome.x_adv[rows_A], x_BCHW[rows_A])
    fell_A = ~is_correct(model, near, y_B[rows_A])
    correct_B, x_adv = outcome.correct_B.clone(), outcome.x_adv.clone()
    correct_B[rows_A[fell_A]], x_adv[rows_A[fell_A]] = False, near[fell_A]
    return Attacked(correct_B, x_adv)


@dataclass(frozen=True, kw_only=True)
class OnGrid:
    """RA under PGD on the margin that stays on the 8-bit grid throughout.

    The network sees rounded images only, and the gradient passes through the rounding.
    """

    title: ClassVar[str] = "RA, images on the 8-bit grid throughout"
    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def on_grid(x: Tensor, index: Tensor) -> Tensor:
            return x + (rounded(self.attack, x, x_BCHW[index]) - x).detach()

        def stands(x: Tensor, index: Tensor) -> Tensor:
            return is_correct(model, on_grid(x, index), y_B[index])

        def objective(x: Tensor, index: Tensor) -> Tensor:
            return margin_per_image(model(on_grid(x, index)).logits, y_B[index])

        before = untouched(model, x_BCHW, y_B)
        found = break_by(stands, self.attack, objective, before, x_BCHW, noise)
        return found._replace(x_adv=rounded(self.attack, found.x_adv, x_BCHW))
