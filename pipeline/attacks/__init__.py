"""Every attack by name. A new one is a file here and a line below."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pipeline.attacks.apgd import APGD
from pipeline.attacks.pgd import PGD, Draw

Objective = Callable[[Tensor], Tensor]


class Attack(Protocol):
    """Settings are fields; a call raises an objective of the images and returns new images."""

    @property
    def eps(self) -> float: ...

    def __call__(self, objective: Objective, x_BCHW: Tensor, noise: Draw = ...) -> Tensor: ...


class Walk(Protocol):
    """One start of an attack on the way, which can be looked at, and relieved of images.

    ``advance`` makes so many steps, ``points`` are the images to be judged (the last of them are
    those to keep), ``keep`` drops all images but those at the rows it is given.
    """

    def advance(self, objective: Objective, steps: int) -> None: ...
    def points(self) -> tuple[Tensor, ...]: ...
    def keep(self, rows_A: Tensor) -> None: ...


class Walker(Attack, Protocol):
    """An attack that can be judged on the way: ``walk`` stands at a new start."""

    @property
    def steps(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def norm(self) -> str: ...

    def walk(self, x_BCHW: Tensor, noise: Draw) -> Walk: ...


ATTACKS: dict[str, type[Attack]] = {
    "pgd": PGD,
    "apgd": APGD,
}
