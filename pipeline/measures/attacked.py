"""What every measure returns, and the attack loop that they share.

Shapes: B images, K classes, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Objective
from pipeline.attacks.pgd import PGD, Draw

CHECK_EVERY = 10  # gradients between two looks at which images are broken


class Attacked(NamedTuple):
    """Attacked images and whether the deployed model still classifies each of them right.

    Attributes:
        correct_B: bool. An image misclassified without an attack counts as broken.
        x_adv: Images within eps of the clean ones, in [0, 1].
    """

    correct_B: Tensor
    x_adv: Tensor


class Measure(Protocol):
    """Settings are fields; a call attacks a frozen model (``moe.folding.fold``)."""

    def __init__(self, *, attack: PGD) -> None: ...
    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked: ...


def is_correct(model: Network, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Judge on the deployed model: hard routing, argmax of the logits. Returns bool (B,)."""
    with torch.no_grad():
        correct_B: Tensor = model(x_BCHW).logits.argmax(1) == y_B
    return correct_B


def break_images(
    attack: PGD,
    model: Network,
    objective: Callable[[Tensor, Tensor], Tensor],
    before: Attacked,
    x_BCHW: Tensor,
    y_B: Tensor,
    noise: Draw,
) -> Attacked:
    """Attack the images that still stand; those that fall are kept as they fell.

    Judged every ten gradients and at the end: an adversary keeps the best it found, and a broken
    image costs nothing more.

    Args:
        objective: ``(x, index)`` to one value an image, for the images of the batch at ``index``.
        before: Outcome so far; its broken images are left alone.
    """
    correct_B, x_adv = before.correct_B.clone(), before.x_adv.clone()
    for _ in range(attack.restarts):
        now = attack.begin(x_BCHW, noise)
        done = 0
        while done < attack.steps and bool(correct_B.any()):
            alive = correct_B.nonzero().squeeze(1)
            steps = min(CHECK_EVERY, attack.steps - done)
            aim = _bind(objective, alive)
            now[alive] = attack.ascend(aim, x_BCHW[alive], now[alive], steps)
            still_A = is_correct(model, now[alive], y_B[alive])
            x_adv[alive] = now[alive]
            correct_B[alive] = still_A
            done += steps
    return Attacked(correct_B, x_adv)


def _bind(objective: Callable[[Tensor, Tensor], Tensor], alive: Tensor) -> Objective:
    return lambda x: objective(x, alive)
