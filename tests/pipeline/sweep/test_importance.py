"""Which settings go with better numbers: against definitions, and what is not claimed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.stats import kruskal, spearmanr

from pipeline.sweep.importance import ENOUGH, associate, holm, importance_table
from pipeline.sweep.trials import Objective, Sweep, Trial
from pipeline.tracking.queries import Run

AXES = (Objective("val/sa", "max"), Objective("val/ra_worst", "max"))


def sweep_of(rows: list[tuple[dict[str, str], float, float]]) -> Sweep:
    trials = [
        Trial(
            Run(str(n), "n", params, {"val/sa": sa, "val/ra_worst": ra}, {}, 0), str(n), "finished"
        )
        for n, (params, sa, ra) in enumerate(rows)
    ]
    keys = tuple(rows[0][0])
    return Sweep(trials[0].run, "s", "p", AXES, keys, "validation", tuple(trials))


@pytest.mark.parametrize("n", [5, 12, 40])
def test_rank_correlation_equals_spearman_s_with_ties(n: int) -> None:
    draw = random.Random(n)
    x = [draw.choice([0.1, 0.2, 0.4, 0.8]) for _ in range(n)]
    y = [0.3 * value + draw.gauss(0, 0.1) for value in x]
    found = associate([str(value) for value in x], y)
    assert found.signed
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    assert found.low <= found.value <= found.high


def test_correlation_ratio_of_words_equals_kruskal_and_wallis() -> None:
    draw = random.Random(0)
    words = [draw.choice(["trades", "pseudo_label", "none"]) for _ in range(30)]
    y = [len(word) + draw.gauss(0, 3) for word in words]
    groups = [[v for w, v in zip(words, y, strict=True) if w == name] for name in set(words)]
    found = associate(words, y)
    assert not found.signed
    assert found.value**2 == pytest.approx(kruskal(*groups).statistic / 29)


def test_chance_is_counted_by_permutation() -> None:
    """Five trials in perfect order: of 120 orders two are as extreme, so p is 1/60."""
    found = associate(["1", "2", "3", "4", "5"], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert found.value == 1.0
    assert found.p == pytest.approx(1 / 60, abs=0.006)


def test_noise_is_called_significant_about_as_often_as_alpha_says() -> None:
    draw = np.random.default_rng(0)
    ps = [
        associate([str(v) for v in draw.random(12)], draw.random(12).tolist(), seed=turn).p
        for turn in range(120)
    ]
    assert 0 < sum(p < 0.05 for p in ps) < 15


def test_holm_equals_its_definition_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    found = holm([0.5, math.nan, 0.02])
    assert found[0] == 0.5
    assert math.isnan(found[1])
    assert found[2] == 0.04


def test_few_trials_claim_nothing_and_many_do() -> None:
    def rows(n: int) -> list[tuple[dict[str, str], float, float]]:
        return [({"lr": str(i / n), "batch_size": "64"}, i / n, (7 * i % n) / n) for i in range(n)]

    few = importance_table(*with_trials(rows(ENOUGH - 1)))
    assert few.rows[0][2].endswith("too few")
    assert "9 trials are too few to tell (fewer than 10): nothing is claimed." in few.notes
    two = importance_table(*with_trials(rows(2)))
    assert not two.rows, "the ranks of two trials always correlate by 1 or -1"
    assert two.notes[-1].startswith("2 trials are too few to tell")
    many = importance_table(*with_trials(rows(31)))
    assert many.rows[0][2].startswith("+1.00 (")
    assert many.rows[0][2].endswith("p < 0.001")
    assert many.rows[0][3].endswith("may be chance")
    assert many.rows[1][2:] == ("one value only", "one value only")
    assert "over 31 trial(s)" in many.title


def with_trials(rows: list[tuple[dict[str, str], float, float]]) -> tuple[Sweep, tuple[Trial, ...]]:
    sweep = sweep_of(rows)
    return sweep, sweep.trials
