"""Pareto front of the trials of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.sweep.trials import Objective, Trial


def front_of(trials: Sequence[Trial], axes: Sequence[Objective]) -> list[Trial]:
    """Return the trials that no other dominates, in their order.

    Raises:
        ValueError: A trial has no finite number on an axis.
    """
    rows = []
    for trial in trials:
        row = []
        for axis in axes:
            if (value := trial.value(axis.metric)) is None:
                raise ValueError(
                    f"{axis.metric} of trial {trial.number} must be a finite number, "
                    f"got {trial.run.metrics.get(axis.metric)}"
                )
            row.append(axis.score(value))
        rows.append(row)
    return [trials[place] for place in undominated(rows)]


def undominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions of the points that no other dominates, higher being better.

    ``a`` dominates ``b`` if ``a_i >= b_i`` for all ``i`` and ``a_i > b_i`` for some, so equal
    points do not dominate each other.

    Raises:
        ValueError: A coordinate is not finite, or the points differ in their number of them.
    """
    for place, point in enumerate(points):
        if len(point) != len(points[0]) or not np.isfinite(point).all():
            raise ValueError(
                f"point {place} must have {len(points[0])} finite coordinates, got {list(point)}"
            )
    points_NA = np.array(points, dtype=float)
    return [
        place
        for place, point_A in enumerate(points_NA)
        if not ((points_NA >= point_A).all(1) & (points_NA > point_A).any(1)).any()
    ]
