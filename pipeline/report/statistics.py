"""Means over seeds and differences between algorithms, with 95% intervals.

A run counts how many of n images stay correctly classified, so its share has an interval over
images; runs of several seeds have one over seeds, on the same images. Each difference names which
of them it rests on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

SEEDS, IMAGES, BOTH = "seeds", "images", "seeds and images"
EQUAL = "equal seeds"


@dataclass(frozen=True)
class Estimate:
    """A share over the runs of one setting.

    Attributes:
        values: One per run.
        low, high: 95% interval: Student's t over runs (``seeds``) or, for a single run, that of its
            images (``images``); NaN where the run has none.
    """

    values: tuple[float, ...]
    low: float
    high: float

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over runs; 0 for a single one."""
        return stdev(self.values) if self.n > 1 else 0.0

    @property
    def over(self) -> str:
        """What the interval is taken over."""
        return SEEDS if self.n > 1 else IMAGES


@dataclass(frozen=True)
class Difference:
    """A difference of two shares with its 95% interval, and what that is taken over."""

    value: float
    low: float
    high: float
    over: str


def estimate(values: Sequence[float], low: float = math.nan, high: float = math.nan) -> Estimate:
    """Average runs; ``low`` and ``high`` are a single run's own interval.

    ``mean +- t(0.975, n - 1) std / sqrt(n)`` for n runs.

    Raises:
        ValueError: There is no run.
    """
    from scipy.stats import ttest_1samp

    if not values:
        raise ValueError("values must hold at least one run, got none")
    if len(values) > 1:
        low, high = _interval(ttest_1samp, values, 0.0)
    return Estimate(tuple(values), low, high)


def difference(a: Estimate, b: Estimate) -> Difference:
    """Subtract ``b`` from ``a``.

    Without any spread on both sides there is no interval: it would be a point, which says that
    seeds never differ. Several runs on both sides otherwise: Welch's interval, ``t`` with
    Satterthwaite's degrees of freedom (Welch, Biometrika 34, 1947). Otherwise Newcombe's hybrid of
    the two intervals (Statistics in Medicine 17, 1998, method 10):
    ``d - sqrt((a - l_a)^2 + (u_b - b)^2)`` to
    ``d + sqrt((u_a - a)^2 + (b - l_b)^2)``, which for single runs is his interval for two
    proportions from Wilson's. It takes the two for independent; models are judged on the same
    images, which as a rule makes the true interval narrower.
    """
    from scipy.stats import ttest_ind

    value = a.mean - b.mean
    if a.n > 1 and b.n > 1:
        if a.std == b.std == 0:
            return Difference(value, math.nan, math.nan, EQUAL)
        return Difference(value, *_interval(ttest_ind, a.values, b.values, equal_var=False), SEEDS)
    low = value - math.hypot(a.mean - a.low, b.high - b.mean)
    high = value + math.hypot(a.high - a.mean, b.mean - b.low)
    return Difference(value, low, high, BOTH if a.over != b.over else IMAGES)


def _interval(test: Any, *samples: Any, **how: Any) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of equal values, an interval of no width
        low, high = test(*samples, **how).confidence_interval(0.95)
    return float(low), float(high)
