"""PGD that needs no step size: it halves its own where it stops making progress.

Shapes: B images, CHW channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from moe.valid_fields import NonNegative, UpToOne, check_fields
from pipeline.attacks.pgd import PGD, UNSEEDED, Draw, Restarts, Steps, highest, uphill

MOMENTUM = 0.25  # share of the last move in the next one


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD: raise a function of the images, one value per image, inside a ball around each.

    ``z = project(x_k + s * direction(grad))``,
    ``x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))``, with ``s = 2 eps`` at first.
    At checkpoints that get denser, an image's step is halved and it goes back to the best point it
    saw, if fewer than ``rho`` of its moves since the last checkpoint went up, or if neither its
    step nor its best changed there (Croce and Hein, ICML 2020, arXiv:2003.01690, algorithm 1 and
    section 3.2). Ours: no momentum across the jump back.

    Attributes:
        eps: Radius in pixel units of [0, 1] (in L2 of the whole image).
        steps: Number of moves. Zero returns the start.
        norm: ``linf`` or ``l2``.
        start: As in ``PGD``.
        restarts: Independent starts, of which each image keeps the one with the highest objective.
        rho: Share of moves that have to go up.

    Raises:
        ValueError: A setting is out of its range.
    """

    eps: NonNegative = 8 / 255
    steps: Steps = 100
    norm: Literal["linf", "l2"] = "linf"
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    restarts: Restarts = 1
    rho: UpToOne = 0.75

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.ball

    @property
    def ball(self) -> PGD:
        """The ball, its start and its projection."""
        return PGD(
            eps=self.eps,
            steps=self.steps,
            norm=self.norm,
            start=self.start,
            restarts=self.restarts,
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
        return self.ball.begin(x_BCHW, noise)

    def ascend(
        self, objective: Callable[[Tensor], Tensor], x_BCHW: Tensor, start: Tensor, steps: int
    ) -> Tensor:
        """Climb with a schedule of ``steps`` moves from ``start``; return each image's best."""
        climb = Climb.at(self, x_BCHW, start, steps)
        climb.advance(objective, steps)
        return climb.best if steps else climb.now

    def walk(self, x_BCHW: Tensor, noise: Draw) -> Climb:
        """Stand at a start, with the schedule of a whole attack ahead."""
        return Climb.at(self, x_BCHW, self.begin(x_BCHW, noise), self.steps)

    def checkpoints(self, steps: int) -> frozenset[int]:
        """List the moves after which progress is checked: ``ceil(p_j * steps)``, with

        ``p_0 = 0``, ``p_1 = 0.22`` and ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``.
        """
        before, share, found = 0.0, 0.22, set()
        while share <= 1:
            found.add(math.ceil(round(share * steps, 9)))
            before, share = share, share + max(share - before - 0.03, 0.06)
        return frozenset(found)


def like(attack: PGD) -> APGD:
    """Make the APGD of a PGD's threat: its ball, steps and restarts; the step size is not used."""
    return APGD(
        eps=attack.eps,
        steps=attack.steps,
        norm=attack.norm,
        start=attack.start,
        restarts=attack.restarts,
    )


@dataclass
class Climb:
    """An APGD attack on the way. Everything but the counts is one row per image.

    Attributes:
        x_BCHW, now, old, best: Clean images, the last two iterates, and the best seen.
        total, done, checked: Moves of the schedule, moves made, and those at the last checkpoint.
        slope, slope_best: Gradients at ``now`` and ``best``.
        height_B, height_best_B: Objective at ``now`` and ``best``.
        best_then_B, halved_B: Best height at the last checkpoint, and whether the step was halved.
        step_B: Step sizes.
        rises_B: Moves since the last checkpoint that went up.
    """

    attack: APGD
    total: int
    x_BCHW: Tensor
    now: Tensor
    old: Tensor
    best: Tensor
    slope: Tensor
    slope_best: Tensor
    height_B: Tensor
    height_best_B: Tensor
    best_then_B: Tensor
    step_B: Tensor
    rises_B: Tensor
    halved_B: Tensor
    done: int = 0
    checked: int = 0
    due: frozenset[int] = field(default_factory=frozenset)

    @staticmethod
    def at(attack: APGD, x_BCHW: Tensor, start: Tensor, total: int) -> Climb:
        """Stand at the start of a schedule."""
        start, low_B = start.detach(), x_BCHW.new_full((len(x_BCHW),), -math.inf)
        zero = torch.zeros_like(start)
        return Climb(
            attack=attack,
            total=total,
            x_BCHW=x_BCHW,
            now=start,
            old=start,
            best=start,
            slope=zero,
            slope_best=zero,
            height_B=low_B,
            height_best_B=low_B,
            best_then_B=low_B,
            step_B=torch.full_like(low_B, 2 * attack.eps),
            rises_B=torch.zeros_like(low_B),
            halved_B=torch.ones_like(low_B, dtype=torch.bool),
            due=attack.checkpoints(total),
        )

    def points(self) -> tuple[Tensor, ...]:
        """Return the images to be judged; the last are those to keep."""
        return self.now, self.best

    def keep(self, rows_A: Tensor) -> None:
        """Drop all images but those at ``rows_A``."""
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), Tensor):
                setattr(self, item.name, value[rows_A])

    def advance(self, objective: Callable[[Tensor], Tensor], steps: int) -> None:
        """Make so many moves."""
        if steps and not self.done:
            self._look(objective, slope=True)
            self.best_then_B = self.height_best_B
        for _ in range(steps):
            self._move()
            self.done += 1
            before_B = self.height_B
            self._look(objective, slope=self.done < self.total)
            self.rises_B = self.rises_B + (self.height_B > before_B)
            if self.done in self.due:
                self._check()

    def _move(self) -> None:
        project, x_BCHW = self.attack.ball.project, self.x_BCHW
        step = self.step_B.view(-1, 1, 1, 1) * uphill(self.slope, self.attack.norm)
        ahead = project(self.now + step, x_BCHW)
        if self.done:
            ahead = torch.lerp(ahead, self.now, MOMENTUM) + MOMENTUM * (self.now - self.old)
            ahead = project(ahead, x_BCHW)
        self.old, self.now = self.now, ahead

    def _look(self, objective: Callable[[Tensor], Tensor], *, slope: bool) -> None:
        """Measure the height and the slope where the images stand; remember the best."""
        now = self.now.detach().requires_grad_()
        with torch.set_grad_enabled(slope):
            height_B = objective(now)
            total = height_B.sum()
        if height_B.shape != (len(now),):
            raise ValueError(
                "APGD needs an objective with one value per image, "
                f"got shape {tuple(height_B.shape)} for {len(now)} images"
            )
        if slope:
            (self.slope,) = torch.autograd.grad(total, now)
        self.height_B, self.now = height_B.detach(), now.detach()
        better_B = ~(self.height_B <= self.height_best_B)  # a NaN is taken, and stays to be seen
        better_B111 = better_B.view(-1, 1, 1, 1)
        self.best = torch.where(better_B111, self.now, self.best)
        self.slope_best = torch.where(better_B111, self.slope, self.slope_best)
        self.height_best_B = torch.where(better_B, self.height_B, self.height_best_B)

    def _check(self) -> None:
        """Halve the step of the images that do not get ahead, and send them back to their best."""
        stuck_B = self.rises_B < self.attack.rho * (self.done - self.checked)
        stuck_B |= ~self.halved_B & (self.height_best_B <= self.best_then_B)
        back_B111 = stuck_B.view(-1, 1, 1, 1)
        self.step_B = torch.where(stuck_B, self.step_B / 2, self.step_B)
        self.old = torch.where(back_B111, self.best, self.old)
        self.now = torch.where(back_B111, self.best, self.now)
        self.slope = torch.where(back_B111, self.slope_best, self.slope)
        self.height_B = torch.where(stuck_B, self.height_best_B, self.height_B)
        self.halved_B, self.best_then_B = stuck_B, self.height_best_B
        self.rises_B, self.checked = torch.zeros_like(self.rises_B), self.done
