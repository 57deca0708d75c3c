"""Error for an unknown name or key, with the nearest valid ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

MOST = 3


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not valid: at most three names, the nearest first.

    A dotted key is compared as a whole and by its last word, so that ``beta`` finds
    ``algorithm.beta``.
    """
    names = list(dict.fromkeys(known))
    if len(names) <= MOST:
        return ValueError(f"no {kind} {name!r}, only {', '.join(names) or 'none'}")
    return ValueError(f"no {kind} {name!r}; nearest: {', '.join(nearest(name, names))}")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the three names that are most like this one."""

    def likeness(other: str) -> float:
        return _ratio(name, other) + _ratio(name.rpartition(".")[2], other.rpartition(".")[2])

    return sorted(known, key=likeness, reverse=True)[:MOST]


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower()).ratio()
