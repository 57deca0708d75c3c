"""Smoothing against a classifier whose smoothed radius is known, and scipy's beta quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.certification.smoothing import ABSTAIN, Smoothing, lower_bound, tail


def half_space(distance: float, dims: int = 6) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A linear classifier and an image at that distance from its plane, on the side of class 2."""
    normal = torch.ones(dims, dtype=torch.float64) / math.sqrt(dims)
    x_CHW = (distance * normal).view(1, 1, dims)
    return lambda x: torch.where(x.flatten(1) @ normal > 0, 2, 0), x_CHW


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("hits", "trials"), [(1, 1), (1, 10), (99, 100), (100, 100), (500, 1000), (99_990, 100_000)]
)
def test_bound_is_the_beta_quantile(hits: int, trials: int) -> None:
    from scipy.stats import beta, binom

    for alpha in (0.001, 0.05):
        want = beta.ppf(alpha, hits, trials - hits + 1)
        assert lower_bound(hits, trials, alpha) == pytest.approx(want, rel=1e-7)
    assert tail(hits, trials, 0.4) == pytest.approx(binom.sf(hits - 1, trials, 0.4), abs=1e-12)


def test_bound_of_no_hits_is_zero_and_nonsense_is_refused() -> None:
    assert lower_bound(0, 10, 0.01) == 0.0
    for hits, trials in ((2, 1), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="hits must be"):
            lower_bound(hits, trials, 0.01)


def test_bound_covers_the_truth_as_often_as_it_says() -> None:
    """20,000 experiments at p = 0.7: the exact bound errs in at most alpha of them."""
    drawn = torch.distributions.Binomial(40, torch.tensor(0.7))
    torch.manual_seed(0)
    counts = drawn.sample((20_000,)).int().tolist()
    bounds = {hits: lower_bound(hits, 40, 0.05) for hits in set(counts)}
    errors = sum(bounds[hits] > 0.7 for hits in counts) / len(counts)
    assert 0.01 < errors < 0.055


def test_radius_comes_close_to_the_distance_from_a_plane_and_stays_below() -> None:
    """The smoothed half space is the half space: its radius is the distance itself."""
    classify, x_CHW = half_space(0.3)
    radii = []
    for samples in (100, 1000, 100_000):
        smoothing = Smoothing(sigma=0.25, samples=samples, batch=20_000)
        answer, radius = smoothing.certify(classify, x_CHW, seeded())
        assert answer == 2
        radii.append(radius)
    assert radii == sorted(radii)
    assert 0.29 < radii[-1] < 0.3


def test_a_class_that_noise_never_gives_is_not_answered() -> None:
    classify, x_CHW = half_space(0.0)
    assert Smoothing(samples=1000).certify(classify, x_CHW, seeded()) == (ABSTAIN, 0.0)
    assert Smoothing(samples=1000).predict(classify, x_CHW, seeded()) == ABSTAIN
    classify, x_CHW = half_space(0.5)
    assert Smoothing(samples=1000).predict(classify, x_CHW, seeded()) == 2
    assert Smoothing(samples=4).predict(classify, x_CHW, seeded()) == ABSTAIN, "4 are too few"


def test_seed_decides_and_batches_are_as_large_as_asked() -> None:
    classify, x_CHW = half_space(0.1)
    found = [
        Smoothing(sigma=0.25, samples=300, choose=64, batch=batch).certify(
            classify, x_CHW, seeded(seed)
        )
        for batch, seed in ((1000, 0), (1000, 0), (1000, 1))
    ]
    assert found[0] == found[1] != found[2]
    sizes: list[int] = []

    def counted(x_BCHW: Tensor) -> Tensor:
        sizes.append(len(x_BCHW))
        return classify(x_BCHW)

    Smoothing(samples=250, choose=10, batch=100).certify(counted, x_CHW, seeded())
    assert sizes == [10, 100, 100, 50]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"alpha": 1.0}, "alpha must be above 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Smoothing(**settings)
