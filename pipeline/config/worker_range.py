"""How many workers a run has: a number, or a range within which they may leave and join."""

from __future__ import annotations

from typing import Any


class Elastic(int):
    """A number of workers that may change as nodes leave and join, written ``least..most``.

    As a number it is the most, so whoever needs room for all of them need not know the difference.

    Raises:
        ValueError: The range is empty, or begins below 1.
    """

    least: int

    def __new__(cls, least: int, most: int) -> Elastic:
        if not 1 <= least <= most:
            raise ValueError(f"workers must be a range such as 1..4, got {least}..{most}")
        made = super().__new__(cls, most)
        made.least = least
        return made

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return self.least, int(self)

    def __repr__(self) -> str:
        return f"{self.least}..{int(self)}"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Elastic) and str(self) == str(other)

    def __ne__(self, other: object) -> bool:  # else it would be that of int
        return not self == other

    def __hash__(self) -> int:
        return hash(str(self))


def read_workers(value: Any) -> int:
    """Read ``4`` or ``1..4``.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    least, dots, most = str(value).partition("..")
    if dots:
        return Elastic(int(least), int(most))
    if isinstance(value, (str, float)) and float(value).is_integer():
        return int(value)
    raise ValueError(f"workers must be a whole number or a range such as 1..4, got {value!r}")


def ends(workers: int) -> tuple[int, int]:
    """Return the fewest and the most workers."""
    return getattr(workers, "least", int(workers)), int(workers)


def counts(workers: int, batch_size: int) -> list[int]:
    """List the numbers of workers that a run may have, in order.

    Each of them splits a batch evenly, so an update sees the same images whichever it is; a number
    within the range that does not is passed over.
    """
    least, most = ends(workers)
    return [count for count in range(least, most + 1) if batch_size % count == 0]
