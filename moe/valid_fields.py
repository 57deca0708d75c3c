"""Bounds and choices stated in the types of a dataclass's fields, and the one check of them.

The markers of ``annotated-types`` say the same, but ``moe`` runs where only torch is installed.
"""

from __future__ import annotations

import functools
import math
import typing
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Within:
    """The numbers from ``low`` to ``high``; infinity and NaN are never among them.

    Attributes:
        low, high: The ends.
        above, below: Whether the lower and the upper end are left out.
        meant: What was probably meant by a number outside, said in the error.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    meant: str = ""

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return f"{low} and finite"
        if not (self.above or self.below):
            return f"from {self.low:g} to {self.high:g}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


NonNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
UpToOne = Annotated[float, Within(0, 1)]
Ratio = Annotated[float, Within(0, 1, above=True)]
BelowOne = Annotated[float, Within(0, 1, below=True)]
InsideOne = Annotated[float, Within(0, 1, above=True, below=True)]
Whole = Annotated[int, Within(0)]
Count = Annotated[int, Within(1)]


def check_fields(settings: Any) -> None:
    """Hold every field to the choices (``Literal``) and bounds (``Within``) of its type.

    None passes where the type has it as a choice.

    Raises:
        ValueError: A field is outside; the message names it, its value and what is valid.
    """
    for name, valid in _rules(type(settings)):  # type: ignore[arg-type]
        value = getattr(settings, name)
        if value is None or value in valid:
            continue
        if isinstance(valid, Within):
            meant = f"; {valid.meant}" if valid.meant else ""
            raise ValueError(f"{name} must be {_said(valid, value)}, got {value}{meant}")
        *others, last = map(str, valid)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def _said(valid: Within, value: float) -> str:
    text = str(valid)
    return text if not math.isfinite(value) else text.removesuffix(" and finite")


@functools.cache
def _rules(kind: type[Any]) -> tuple[tuple[str, Within | tuple[Any, ...]], ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(
        (field.name, rule) for field in fields(kind) for rule in _rules_of(hints[field.name])
    )


def _rules_of(hint: Any) -> list[Within | tuple[Any, ...]]:
    if typing.get_origin(hint) is Annotated:
        return [mark for mark in hint.__metadata__ if isinstance(mark, Within)]
    if typing.get_origin(hint) is Literal:
        return [typing.get_args(hint)]
    return [rule for part in typing.get_args(hint) for rule in _rules_of(part)]


class CheckedFields:
    """Base of a dataclass whose fields are held to their types when it is made."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field is outside; the message names it, its value and what is valid.
        """
        check_fields(self)
