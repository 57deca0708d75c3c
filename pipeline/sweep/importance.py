"""Importance of the searched settings: rank association with the objectives, and its chance.

A few dozen trials support no model of a response surface, so nothing is fitted: ranks are compared.
For numbers Spearman's rank correlation (American Journal of Psychology 15, 1904), which has a sign;
for words the correlation ratio of the ranks, ``eta^2 = H / (n - 1)`` with Kruskal and Wallis' H
(JASA 47, 1952), as its root. Chance is judged by permutation, Holm's way over the settings
(Scandinavian Journal of Statistics 6, 1979). It is association in the trials that finished, which
the search and the early stops have chosen; it is no effect of one setting with others held still.

Shapes: N trials, R repetitions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.report.runs import number
from pipeline.report.tables import TextTable
from pipeline.sweep.trial_tables import short_keys
from pipeline.sweep.trials import Objective, Sweep, Trial

ENOUGH = 10  # trials below which nothing is claimed
REPETITIONS = 4999
ALPHA = 0.05
NOTE = (
    "Rank correlation with a 95% bootstrap interval (for words: correlation ratio of the ranks, "
    "without a sign); p by permutation, Holm's over the settings. Association among the trials "
    "that finished, not the effect of one setting alone."
)


@dataclass(frozen=True)
class Association:
    """Rank association of an objective with a setting over the trials.

    Attributes:
        value: Rank correlation in [-1, 1], or correlation ratio in [0, 1]; NaN where either side
            has one value only.
        low, high: 95% percentile bootstrap interval over trials.
        p: Of chance, by permutation, before Holm.
        signed: Whether the setting is a number.
    """

    value: float
    low: float
    high: float
    p: float
    signed: bool


def associate(setting: Sequence[str], outcome: Sequence[float], *, seed: int = 0) -> Association:
    """Compare the ranks of a setting's values with those of an objective.

    Args:
        setting: Values as MLflow keeps them: numbers if all of them are.
        seed: Of the permutations and the bootstrap.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap, permutation_test, rankdata

    read = [value for text in setting if isinstance(value := number(text), float)]
    signed = len(read) == len(setting)
    x_N = np.array(read) if signed else np.unique(list(setting), return_inverse=True)[1]
    y_N = np.asarray(outcome, dtype=float)
    if len(set(x_N.tolist())) < 2 or len(set(y_N.tolist())) < 2:
        return Association(math.nan, math.nan, math.nan, math.nan, signed)
    measure = correlation if signed else ratio

    def of_ranks(x_RN: np.ndarray, y_RN: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):  # a sample of one value only
            own_RN = rankdata(x_RN, axis=-1) if signed else x_RN
            return measure(own_RN, rankdata(y_RN, axis=-1))

    options: dict[str, Any] = {"n_resamples": REPETITIONS, "vectorized": True, "rng": seed}
    chance = permutation_test(
        (rankdata(y_N),),
        lambda y_RN, axis: measure(rankdata(x_N) if signed else x_N, y_RN),
        permutation_type="pairings",
        alternative="two-sided" if signed else "greater",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of samples of one value only
        boot = bootstrap((x_N, y_N), of_ranks, paired=True, method="percentile", **options)
    low, high = np.nanquantile(boot.bootstrap_distribution, [0.025, 0.975])
    return Association(
        float(of_ranks(x_N, y_N)), float(low), float(high), float(chance.pvalue), signed
    )


def correlation(x_RN: np.ndarray, y_RN: np.ndarray) -> np.ndarray:
    """Pearson's correlation over the last axis: of ranks it is Spearman's."""
    x_RN = x_RN - x_RN.mean(-1, keepdims=True)
    y_RN = y_RN - y_RN.mean(-1, keepdims=True)
    return np.asarray((x_RN * y_RN).sum(-1) / np.sqrt((x_RN**2).sum(-1) * (y_RN**2).sum(-1)))


def ratio(groups_RN: np.ndarray, y_RN: np.ndarray) -> np.ndarray:
    """Root of the share of the ranks' variance that lies between groups, over the last axis."""
    y_RN = y_RN - y_RN.mean(-1, keepdims=True)
    inside = [groups_RN == group for group in np.unique(groups_RN)]
    between = sum(
        (y_RN * own).sum(-1) ** 2 / np.maximum(np.broadcast_to(own, y_RN.shape).sum(-1), 1)
        for own in inside
    )
    return np.asarray(np.sqrt(between / (y_RN**2).sum(-1)))


def holm(ps: Sequence[float]) -> list[float]:
    """Raise p-values so that any of them below alpha is one at alpha over all; NaN stays out."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    raised, most = list(ps), 0.0
    for turn, place in enumerate(order):
        most = max(most, min(1.0, (len(order) - turn) * ps[place]))
        raised[place] = most
    return raised


def importance_table(sweep: Sweep, compared: Sequence[Trial]) -> TextTable:
    """Lay out the associations of every searched setting with every objective."""
    keys = [key for key in sweep.keys if key != "seed"]
    n = len(compared)
    names = ("setting", "values")
    columns = [column(keys, compared, axis) for axis in sweep.axes]
    rows = []
    for place, (key, name) in enumerate(zip(keys, short_keys(keys), strict=True)):
        values = {trial.run.params.get(key, "-") for trial in compared}
        rows.append((name, str(len(values)), *(found[place] for found in columns)))
    title = f"What goes with better numbers, over {n} trial(s)"
    few = f"{n} trials are too few to tell (fewer than {ENOUGH}): nothing is claimed."
    return TextTable(
        title,
        (*names, *(axis.title for axis in sweep.axes)),
        tuple(rows) if n > 2 else (),  # of two trials the ranks agree, or disagree, wholly
        words=("setting",),
        notes=(NOTE, *((few,) if n < ENOUGH else ())),
    )


def column(keys: Sequence[str], compared: Sequence[Trial], axis: Objective) -> list[str]:
    """Write one objective's associations with their p-values."""
    outcome = [value for trial in compared if (value := trial.value(axis.metric)) is not None]
    found = [
        associate([trial.run.params.get(key, "-") for trial in compared], outcome) for key in keys
    ]
    raised = holm([each.p for each in found])
    return [
        described(each, p, enough=len(compared) >= ENOUGH)
        for each, p in zip(found, raised, strict=True)
    ]


def described(found: Association, p: float, *, enough: bool) -> str:
    """Write an association; of too few trials, or with a p above alpha, it claims nothing."""
    if math.isnan(found.value):
        return "one value only"
    sign = "+" if found.signed else ""
    text = f"{found.value:{sign}.2f} ({found.low:{sign}.2f} to {found.high:{sign}.2f})"
    if not enough:
        return f"{text}, too few"
    chance = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{text}, {chance}" + ("" if p < ALPHA else ": may be chance")
