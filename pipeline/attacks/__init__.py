"""Every attack by name. A new one is a file here and a line below."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pipeline.attacks.pgd import PGD, Draw

Objective = Callable[[Tensor], Tensor]


class Attack(Protocol):
    """Settings are fields; a call raises an objective of the images and returns new images."""

    @property
    def eps(self) -> float: ...

    def __call__(self, objective: Objective, x_BCHW: Tensor, noise: Draw = ...) -> Tensor: ...


ATTACKS: dict[str, type[Attack]] = {
    "pgd": PGD,
}
