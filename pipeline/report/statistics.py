"""Means over seeds and differences between algorithms, with 95% intervals.

A run counts how many of n images stand, so its share has an interval over images; runs of several
seeds have one over seeds, on the same images. Which of them a difference rests on is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

SEEDS, IMAGES, BOTH = "seeds", "images", "seeds and images"


@dataclass(frozen=True)
class Estimate:
    """A share over the runs of one setting.

    Attributes:
        mean, std: Over runs; ``std`` is 0 for a single one.
        low, high: 95% interval: Student's t over runs (``seeds``) or, for a single run, that of its
            images (``images``); NaN where the run does not say it.
    """

    mean: float
    std: float
    n: int
    low: float
    high: float

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
    if not values:
        raise ValueError("values must hold at least one run, got none")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Estimate(mean, 0.0, 1, low, high)
    std = stdev(values)
    half = t975(n - 1) * std / math.sqrt(n)
    return Estimate(mean, std, n, mean - half, mean + half)


def difference(a: Estimate, b: Estimate) -> Difference:
    """Subtract ``b`` from ``a``.

    Several runs on both sides: Welch's interval, ``t`` with Satterthwaite's degrees of freedom
    (Welch, Biometrika 34, 1947). Otherwise Newcombe's hybrid of the two intervals (Statistics in
    Medicine 17, 1998, method 10): ``d - sqrt((a - l_a)^2 + (u_b - b)^2)`` to
    ``d + sqrt((u_a - a)^2 + (b - l_b)^2)``, which for single runs is his interval for two
    proportions from Wilson's. It takes the two for independent; models are judged on the same
    images, which as a rule makes the true interval narrower.
    """
    value = a.mean - b.mean
    if a.n > 1 and b.n > 1:
        half = _welch_half(a, b)
        return Difference(value, value - half, value + half, SEEDS)
    low = value - math.hypot(a.mean - a.low, b.high - b.mean)
    high = value + math.hypot(a.high - a.mean, b.mean - b.low)
    return Difference(value, low, high, BOTH if a.over != b.over else IMAGES)


def _welch_half(a: Estimate, b: Estimate) -> float:
    parts = (a.std**2 / a.n, b.std**2 / b.n)
    if not (variance := sum(parts)):
        return 0.0
    freedom = variance**2 / (parts[0] ** 2 / (a.n - 1) + parts[1] ** 2 / (b.n - 1))
    return t975(freedom) * math.sqrt(variance)


def t975(freedom: float) -> float:
    """Student's t at 0.975, for a two-sided 95% interval."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
