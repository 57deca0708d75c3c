"""Whether the two highest logits meet where the class changes.

A margin that jumps over zero has been written on top of the classifier: a code of its answer, a
bonus for it, a table. Gradients are exact then, and say nothing of where the answer changes.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked

HALVINGS = 24  # down to the last digit of float32
JUMP = 0.1  # of the margins at both ends of the line
RANDOM = 4


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Whether the margin is near zero on both sides of a change of class: bool (B,).

    From each image a line leads to one of another class, its negative, its mirror images, grey or
    noise. Where the class changes on it, found by halving, the lead of the highest logit over the
    next is compared with that at the ends of the line. An image counts as fine if no line leads to
    another class, or if its route changes at the same place: hard gates do jump.
    """

    attack: PGD = PGD()

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        with torch.no_grad():
            return Attacked(is_continuous(model, x_BCHW, noise), x_BCHW)


def is_continuous(model: Network, x_BCHW: Tensor, noise: Draw) -> Tensor:
    """See ``Continuous``."""
    start_B, low = model(x_BCHW).logits.argmax(1), x_BCHW
    high, found_B = x_BCHW.clone(), torch.zeros_like(start_B, dtype=torch.bool)
    ends = [1 - x_BCHW, x_BCHW.flip(3), x_BCHW.flip(2), torch.full_like(x_BCHW, 0.5)]
    ends += [(noise.uniform(x_BCHW) + 1) / 2 for _ in range(RANDOM)]
    for end in ends:
        new_B = ~found_B & (model(end).logits.argmax(1) != start_B)
        high[new_B], found_B = end[new_B], found_B | new_B
    far_B = lead(model, low) + lead(model, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        same_B111 = (model(middle).logits.argmax(1) == start_B).view(-1, 1, 1, 1)
        low, high = torch.where(same_B111, middle, low), torch.where(same_B111, high, middle)
    one, other = model(low).route, model(high).route
    routed_B = (one != other).reshape(len(one), -1).any(1)
    jump_B = lead(model, low) + lead(model, high)
    fine_B: Tensor = ~found_B | routed_B | (jump_B <= JUMP * far_B)
    return fine_B


def lead(model: Network, x_BCHW: Tensor) -> Tensor:
    """Lead of the highest logit over the next, (B,)."""
    top_B2: Tensor = model(x_BCHW).logits.topk(2, 1).values
    return top_B2[:, 0] - top_B2[:, 1]
