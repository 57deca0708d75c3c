"""The Pareto front: which trials are on it, compared with its definition."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from pipeline.sweep.pareto import front_of, undominated
from pipeline.sweep.trials import Objective, Trial
from pipeline.tracking.queries import Run

AXES = (Objective("val/sa", "max"), Objective("val/ra_worst", "max"), Objective("cost/gmac", "min"))


def by_definition(points: Sequence[Sequence[float]]) -> list[int]:
    """Compare every point with every other: the slow twin."""
    return [
        j
        for j, b in enumerate(points)
        if not any(
            all(a[k] >= b[k] for k in range(len(b))) and any(a[k] > b[k] for k in range(len(b)))
            for a in points
        )
    ]


def trial(number: int, sa: float, ra: float, gmac: float) -> Trial:
    metrics = {"val/sa": sa, "val/ra_worst": ra, "cost/gmac": gmac}
    return Trial(Run(f"r{number}", "n", {}, metrics, {}, 0), str(number), "finished")


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_front_equals_its_definition_on_random_points_with_many_ties(axes: int) -> None:
    draw = random.Random(axes)
    for levels, count in itertools.product((2, 5, 1000), (1, 2, 7, 60)):
        points = [[draw.randrange(levels) / levels for _ in range(axes)] for _ in range(count)]
        assert undominated(points) == by_definition(points)


def test_equal_points_stay_together() -> None:
    assert undominated([[1, 0], [0, 1], [1, 0], [0, 0]]) == [0, 1, 2]


def test_of_nothing_the_front_is_nothing() -> None:
    assert undominated([]) == []


def test_cheaper_is_better_and_more_robust_is_better() -> None:
    """1 beats 0 on cost alone; 2 costs more but stands more; 3 is worse than 2 on all counts."""
    trials = [trial(0, 0.5, 0.3, 0.2), trial(1, 0.5, 0.3, 0.1), trial(2, 0.4, 0.4, 0.2)]
    trials.append(trial(3, 0.3, 0.3, 0.3))
    assert [t.number for t in front_of(trials, AXES)] == ["1", "2"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=r"val/ra_worst of trial 1 must be a finite number"):
        front_of([trial(0, 0.5, 0.3, 0.2), trial(1, 0.5, value, 0.2)], AXES)
    with pytest.raises(ValueError, match="point 1 must have 2 finite coordinates"):
        undominated([[0.0, 0.0], [value, 0.0]])


def test_an_objective_goes_up_or_down() -> None:
    with pytest.raises(ValueError, match="mode of val/sa must be max or min, got 'up'"):
        Objective("val/sa", "up")
