"""What every measure returns, and the attack loop that they share.

Shapes: B images, K classes, A images still standing, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Objective, Walker
from pipeline.attacks.pgd import PGD, Draw

HEARTBEAT: ContextVar[Callable[[], None]] = ContextVar("heartbeat", default=lambda: None)
"""Called between two pieces of an attack, for whoever shows that it is going on."""
CHECK_EVERY = 10  # gradients between two looks at which images are broken


class Attacked(NamedTuple):
    """Attacked images and whether the deployed model still classifies each of them right.

    Attributes:
        correct_B: bool. An image misclassified without an attack counts as broken.
        x_adv: Images within eps of the clean ones, in [0, 1].
    """

    correct_B: Tensor
    x_adv: Tensor


Role = Literal["white_box", "black_box", "transfer", "mixed"]
"""What an attack sees of the model: its gradients, its answers, another network's gradients; mixed
is an ensemble with both (AutoAttack)."""


def role_of(measure: object) -> Role:
    """Read a measure's role, a class attribute ``role``; white box where it has none."""
    role: Role = getattr(measure, "role", "white_box")
    return role


def cost_of(measure: Measure) -> float:
    """Estimate gradients per image: ``cost`` (1 where a measure has none) times the steps.

    For the time that is left; how many images an attack breaks early is not in it.
    """
    attack = measure.attack
    return float(getattr(measure, "cost", 1.0)) * attack.steps * attack.restarts


class Measure(Protocol):
    """Settings are fields; a call attacks a frozen model (``moe.fold_batchnorm.fold``).

    A measure may say of itself, as class attributes: ``title``, its words in tables; ``role``, see
    ``role_of``; ``cost``, its gradients per image and step over those of PGD (for two experts);
    ``routed``, that a dense net has nothing for it to attack; ``floor``, that it does not judge the
    deployed model; ``package``, which it needs beside torch.
    """

    def __init__(self, *, attack: PGD) -> None: ...
    @property
    def attack(self) -> Walker: ...
    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked: ...


def is_correct(model: Network, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Judge on the deployed model: hard routing, argmax of the logits. Returns bool (B,)."""
    with torch.no_grad():
        correct_B: Tensor = model(x_BCHW).logits.argmax(1) == y_B
    return correct_B


def untouched(model: Network, x_BCHW: Tensor, y_B: Tensor) -> Attacked:
    """Return the outcome before any attack."""
    return Attacked(is_correct(model, x_BCHW, y_B), x_BCHW)


def break_images(
    attack: Walker,
    model: Network,
    objective: Callable[[Tensor, Tensor], Tensor],
    before: Attacked,
    x_BCHW: Tensor,
    y_B: Tensor,
    noise: Draw,
) -> Attacked:
    """Attack the images that still stand; those that fall are kept as they fell.

    Judged on the deployed model, every ten gradients and at the end: an adversary keeps the best
    it found, and a broken image costs nothing more.

    Args:
        objective: ``(x, index)`` to one value per image, for the images of the batch at ``index``.
        before: Outcome so far; its broken images are left alone.
    """

    def stands(x: Tensor, index_A: Tensor) -> Tensor:
        return is_correct(model, x, y_B[index_A])

    return break_by(stands, attack, objective, before, x_BCHW, noise)


def break_by(
    stands: Callable[[Tensor, Tensor], Tensor],
    attack: Walker,
    objective: Callable[[Tensor, Tensor], Tensor],
    before: Attacked,
    x_BCHW: Tensor,
    noise: Draw,
) -> Attacked:
    """Attack as ``break_images`` does, with another judge.

    Args:
        stands: ``(x, index)`` to bool (A,): which images of the batch at ``index`` still stand.
    """
    correct_B, x_adv = before.correct_B.clone(), before.x_adv.clone()
    for _ in range(attack.restarts):
        walk = attack.walk(x_BCHW, noise)
        alive_A, done = correct_B.nonzero().squeeze(1), 0
        walk.keep(alive_A)
        while done < attack.steps and len(alive_A):
            steps = min(CHECK_EVERY, attack.steps - done)
            walk.advance(_bind(objective, alive_A), steps)
            HEARTBEAT.get()()
            done += steps
            on_A = torch.ones_like(alive_A, dtype=torch.bool)
            for point in walk.points():
                if bool(on_A.any()):
                    rows_A = alive_A[on_A]
                    x_adv[rows_A], correct_B[rows_A] = point[on_A], stands(point[on_A], rows_A)
                    on_A = correct_B[alive_A]
            walk.keep(on_A)
            alive_A = alive_A[on_A]
    return Attacked(correct_B, x_adv)


def _bind(objective: Callable[[Tensor, Tensor], Tensor], alive_A: Tensor) -> Objective:
    """Bind an objective to rows; zero times the image keeps one without a graph from raising."""
    return lambda x: objective(x, alive_A) + 0 * x.flatten(1).sum(1)


def slope_of(height: Objective, x_BCHW: Tensor) -> Tensor:
    """Return the gradient of a height, zero where nothing depends on the images."""
    x = x_BCHW.detach().clone().requires_grad_()
    with torch.enable_grad():
        found = height(x).sum()
        if not found.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(found, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient
