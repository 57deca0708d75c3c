"""The trials that nothing beats on every count at once: the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.sweep.trials import Objective, Trial


def front_of(trials: Sequence[Trial], axes: Sequence[Objective]) -> list[Trial]:
    """Return the trials that no other dominates, in their order.

    Raises:
        ValueError: A trial has no finite number on an axis.
    """
    rows = []
    for trial in trials:
        values = [trial.value(axis.metric) for axis in axes]
        for axis, value in zip(axes, values, strict=True):
            if value is None:
                raise ValueError(
                    f"{axis.metric} of trial {trial.number} must be a finite number, "
                    f"got {trial.run.metrics.get(axis.metric)}"
                )
        pairs = zip(axes, values, strict=True)
        rows.append([axis.score(value) for axis, value in pairs if value is not None])
    chosen = set(undominated(rows))
    return [trial for place, trial in enumerate(trials) if place in chosen]


def undominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions of the points that no other dominates, higher being better.

    ``a`` dominates ``b`` if ``a_i >= b_i`` for all ``i`` and ``a_i > b_i`` for some. Equal points
    do not dominate each other. In falling lexicographic order a point can be dominated by earlier
    ones alone, and by transitivity by one of the front so far (Kung, Luccio and Preparata, JACM 22,
    1975, begin the same way).

    Raises:
        ValueError: A coordinate is not finite, or the points differ in their number of them.
    """
    for place, point in enumerate(points):
        if len(point) != len(points[0]) or not all(map(math.isfinite, point)):
            raise ValueError(
                f"point {place} must have {len(points[0])} finite coordinates, got {list(point)}"
            )
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: tuple(points[i]), reverse=True):
        if not any(dominates(points[other], points[place]) for other in front):
            front.append(place)
    return sorted(front)


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Tell whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    pairs = list(zip(a, b, strict=True))
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)
