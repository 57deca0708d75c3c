"""Projected gradient descent in two norms.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from moe.valid_fields import NonNegative, Within, check_fields

Steps = Annotated[int, Within(0, 10_000, meant="more of them break no further image")]
Restarts = Annotated[int, Within(1, 1_000)]

TINY = 1e-12  # keeps the direction of a zero gradient finite


class Draw(Protocol):
    """A source of random numbers shaped like the images, see ``pipeline.seeding``."""

    def uniform(self, x_BCHW: Tensor) -> Tensor: ...
    def normal(self, x_BCHW: Tensor) -> Tensor: ...


class Unseeded:
    """Numbers of torch's global generator, for interactive use."""

    def uniform(self, x_BCHW: Tensor) -> Tensor:
        return torch.rand_like(x_BCHW) * 2 - 1

    def normal(self, x_BCHW: Tensor) -> Tensor:
        return torch.randn_like(x_BCHW)


UNSEEDED = Unseeded()


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Raise a function of the images inside a ball of radius eps around each of them.

    ``x <- clip_[0,1](project(x + step_size * direction(grad objective(x))))`` (Madry et al., ICLR
    2018, arXiv:1706.06083); the direction is the sign for L-inf, the normalized gradient for L2.
    ``direction`` is a method, so that momentum is a subclass of a few lines. The objective says
    what is attacked (the classifier, the router, one expert): no new target
    needs a new attack. It returns one number or one per image; restarts need the latter.

    Attributes:
        eps, step_size: Radius and step in pixel units of [0, 1] (in L2 of the whole image).
        steps: Number of gradients. Zero returns the start.
        norm: ``linf`` or ``l2``.
        start: ``uniform`` in the ball, ``gaussian`` of deviation 0.001 (TRADES, AdvMoE), ``clean``.
        restarts: Independent starts, of which each image keeps the one with the highest objective.

    Raises:
        ValueError: A setting is out of its range.
    """

    eps: NonNegative = 8 / 255
    step_size: NonNegative = 2 / 255
    steps: Steps = 10
    norm: Literal["linf", "l2"] = "linf"
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    restarts: Restarts = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("eps", "step_size"):
            if self.norm == "linf" and (value := getattr(self, name)) > 1:
                raise ValueError(
                    f"{name} must be from 0 to 1, since pixels are, got {value:g}"
                    f"; {value:g}/255 was probably meant"
                )

    def __call__(
        self, objective: Callable[[Tensor], Tensor], x_BCHW: Tensor, noise: Draw = UNSEEDED
    ) -> Tensor:
        """Return detached images. Touches no parameter's ``.grad`` and no train/eval mode."""
        tries = (
            self.ascend(objective, x_BCHW, self.begin(x_BCHW, noise), self.steps)
            for _ in range(self.restarts)
        )
        return highest(objective, tries, self.restarts)

    def begin(self, x_BCHW: Tensor, noise: Draw) -> Tensor:
        """Return the start: images inside the ball and [0, 1]."""
        if self.start == "clean" or self.eps == 0:
            return x_BCHW.detach().clone()
        if self.start == "gaussian":
            step = 0.001 * noise.normal(x_BCHW)
        elif self.norm == "linf":
            step = self.eps * noise.uniform(x_BCHW)
        else:  # uniform in the L2 ball: a direction, times the CHW-th root of a uniform number
            direction = noise.normal(x_BCHW)
            share_B = (noise.uniform(x_BCHW)[:, :1, :1, :1] + 1) / 2
            radius_B = self.eps * share_B ** (1 / x_BCHW[0].numel())
            step = radius_B * direction / _norm(direction)
        return self.project(x_BCHW + step, x_BCHW)

    def ascend(
        self, objective: Callable[[Tensor], Tensor], x_BCHW: Tensor, start: Tensor, steps: int
    ) -> Tensor:
        """Climb for ``steps`` gradients from ``start``, inside the ball around ``x_BCHW``."""
        return self.climb(objective, x_BCHW, start, torch.zeros_like(start), steps)[0]

    def climb(
        self,
        objective: Callable[[Tensor], Tensor],
        x_BCHW: Tensor,
        start: Tensor,
        memory: Tensor,
        steps: int,
    ) -> tuple[Tensor, Tensor]:
        """Climb as ``ascend`` does, and return the memory of ``direction`` too."""
        x_adv = start.detach()
        for _ in range(steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
            way, memory = self.direction(gradient, memory)
            x_adv = self.project(x_adv.detach() + self.step_size * way, x_BCHW)
        return x_adv.detach(), memory

    def direction(self, gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return where a step of size 1 goes, and what the next one gets as its memory.

        The memory is shaped like the images and zero at first. A subclass with momentum overrides
        this and nothing else.
        """
        return uphill(gradient, self.norm), memory

    def project(self, x_adv: Tensor, x_BCHW: Tensor) -> Tensor:
        """Return the nearest images in the ball, then in [0, 1]."""
        if self.norm == "linf":
            return x_adv.clamp(x_BCHW - self.eps, x_BCHW + self.eps).clamp(0, 1)
        step = x_adv - x_BCHW
        shrink = (self.eps / _norm(step)).clamp(max=1)
        return (x_BCHW + shrink * step).clamp(0, 1)

    def walk(self, x_BCHW: Tensor, noise: Draw) -> March:
        """Stand at a start."""
        start = self.begin(x_BCHW, noise)
        return March(self, x_BCHW, start, torch.zeros_like(start))


@dataclass
class March:
    """A PGD attack on the way, one row per image; see ``pipeline.attacks.Walk``."""

    attack: PGD
    x_BCHW: Tensor
    now: Tensor
    memory: Tensor

    def points(self) -> tuple[Tensor, ...]:
        """Return the images to be judged."""
        return (self.now,)

    def keep(self, rows_A: Tensor) -> None:
        """Drop all images but those at ``rows_A``."""
        self.x_BCHW, self.now = self.x_BCHW[rows_A], self.now[rows_A]
        self.memory = self.memory[rows_A]

    def advance(self, objective: Callable[[Tensor], Tensor], steps: int) -> None:
        """Make so many steps."""
        self.now, self.memory = self.attack.climb(
            objective, self.x_BCHW, self.now, self.memory, steps
        )


def highest(
    objective: Callable[[Tensor], Tensor], tries: Iterator[Tensor], restarts: int
) -> Tensor:
    """Return, for each image, the try with the highest objective; the first of equals.

    Raises:
        ValueError: There are restarts, and the objective has not one value per image.
    """
    best = next(tries)
    if restarts == 1:
        return best
    height_B = _heights(objective, best, restarts)
    for again in tries:
        other_B = _heights(objective, again, restarts)
        best = torch.where((other_B > height_B).view(-1, 1, 1, 1), again, best)
        height_B = torch.maximum(height_B, other_B)
    return best


def _heights(objective: Callable[[Tensor], Tensor], x_BCHW: Tensor, restarts: int) -> Tensor:
    with torch.no_grad():
        heights = objective(x_BCHW)
    if heights.shape != (len(x_BCHW),):
        raise ValueError(
            f"restarts={restarts} needs an objective with one value per image, "
            f"got shape {tuple(heights.shape)} for {len(x_BCHW)} images"
        )
    return heights


def uphill(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of steepest ascent: the sign in L-inf, the unit vector in L2."""
    if norm == "linf":
        # sign(NaN) may be 0 and turn the attack into a no-op: 0 * gradient keeps it visible
        return gradient.sign() + 0 * gradient
    return gradient / _norm(gradient)


def _norm(x_BCHW: Tensor) -> Tensor:
    norm_B: Tensor = torch.linalg.vector_norm(x_BCHW.flatten(1), dim=1)
    return norm_B.clamp(min=TINY).view(-1, 1, 1, 1)
