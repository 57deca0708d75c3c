"""The threat that models are judged under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.valid_fields import Count, check_fields
from pipeline.attacks.pgd import PGD


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Radius and strength of the attacks that judge a model, apart from those that train it.

    Attributes:
        eps, step_size, norm: As in ``PGD``.
        steps: Gradients of the attacks on the test split; they name the metric, ``ra_pgd50``.
        restarts: Independent starts of each of them.
        validation_steps: Gradients of the attack that selects the model, on the validation split.

    Raises:
        ValueError: A setting is out of its range.
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    norm: Literal["linf", "l2"] = "linf"
    steps: Count = 50
    restarts: int = 1
    validation_steps: Count = 10

    def __post_init__(self) -> None:
        check_fields(self)
        self.attack(self.steps)

    def attack(self, steps: int, kind: type[PGD] = PGD) -> PGD:
        """Make the attack with so many gradients; of another kind, with its own other settings."""
        return kind(
            eps=self.eps,
            step_size=self.step_size,
            norm=self.norm,
            steps=steps,
            restarts=self.restarts,
        )
