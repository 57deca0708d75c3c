"""Square Attack: random search that sees an objective and no gradient.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.valid_fields import CheckedFields, Count, NonNegative, Ratio
from pipeline.attacks.pgd import PGD, UNSEEDED, Draw

HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # of the share, in ten thousandths


@dataclass(frozen=True, kw_only=True)
class RandomSearch(CheckedFields):
    """Raise an objective, one value per image, by patches at random places of the ball's surface.

    It begins with stripes of one pixel's width, and keeps a square of a new sign per channel where
    that raises the objective; the squares shrink on the paper's schedule (Andriushchenko et al.,
    ECCV 2020, arXiv:1912.00049, algorithms 1 and 2). For L2 the same patches are scaled to the
    sphere, which is simpler, and weaker, than the paper's algorithm 3.

    Attributes:
        eps, norm: As in ``PGD``.
        queries: Evaluations of the objective per image, the start included.
        share: Of the pixels in the first squares.
    """

    eps: NonNegative = 8 / 255
    norm: Literal["linf", "l2"] = "linf"
    queries: Count = 100
    share: Ratio = 0.8

    def __call__(self, objective: object, x_BCHW: Tensor, noise: Draw = UNSEEDED) -> Tensor:
        """Return detached images inside the ball and [0, 1]."""
        assert callable(objective)
        with torch.no_grad():
            stripes = noise.uniform(x_BCHW)[:, :, :1].sign().expand_as(x_BCHW)
            signs = torch.where(stripes == 0, 1.0, stripes)
            best = self._at(signs, x_BCHW)
            height_B = objective(best)
            for query in range(1, self.queries):
                tried = self._patched(signs, query, noise)
                moved = self._at(tried, x_BCHW)
                other_B = objective(moved)
                higher = (other_B > height_B).view(-1, 1, 1, 1)
                signs, best = torch.where(higher, tried, signs), torch.where(higher, moved, best)
                height_B = torch.maximum(height_B, other_B)
        return best.detach()

    def _at(self, signs: Tensor, x_BCHW: Tensor) -> Tensor:
        ball = PGD(eps=self.eps, norm=self.norm)
        if self.norm == "linf":
            return ball.project(x_BCHW + self.eps * signs, x_BCHW)
        return ball.project(x_BCHW + 1e6 * signs, x_BCHW)

    def _patched(self, signs: Tensor, query: int, noise: Draw) -> Tensor:
        """Give a square of each image a new sign per channel, at a place of its own."""
        height, width = signs.shape[2:]
        at = 10_000 * query / self.queries
        share = self.share / 2 ** sum(at > step for step in HALVINGS)
        side = min(max(1, round((share * height * width) ** 0.5)), height, width)
        drawn = noise.uniform(signs[:, :, :1, :3])
        sign_BC11 = torch.where(drawn[:, :, :1, :1] < 0, -1.0, 1.0)
        place_B2 = (drawn[:, 0, 0, 1:3] + 1) / 2
        top_B = (place_B2[:, 0] * (height - side + 1)).long().clamp(max=height - side)
        left_B = (place_B2[:, 1] * (width - side + 1)).long().clamp(max=width - side)
        rows_BH = torch.arange(height, device=signs.device) - top_B[:, None]
        columns_BW = torch.arange(width, device=signs.device) - left_B[:, None]
        inside = ((rows_BH >= 0) & (rows_BH < side))[:, None, :, None]
        inside = inside & ((columns_BW >= 0) & (columns_BW < side))[:, None, None, :]
        return torch.where(inside, sign_BC11, signs)
