"""Which searched settings go with better numbers, and whether the trials can tell at all.

A few dozen trials carry no model of a response surface, so nothing is fitted: ranks are compared.
For numbers Spearman's rank correlation (American Journal of Psychology 15, 1904), which has a sign;
for words the correlation ratio of the ranks, ``eta^2 = H / (n - 1)`` with Kruskal and Wallis' H
(JASA 47, 1952), as its root. Chance is judged by permutation, Holm's way over the settings
(Scandinavian Journal of Statistics 6, 1979). It is association in the trials that finished, which
the search and the early stops have chosen; it is no effect of one setting with others held still.

Shapes: N trials, R repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.runs import number
from pipeline.sweep.trial_tables import Table, short_keys
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
    """How closely an objective follows a setting in the trials.

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
    from scipy.stats import rankdata

    read = [value for text in setting if isinstance(value := number(text), float)]
    signed = len(read) == len(setting)
    coded = {text: float(code) for code, text in enumerate(sorted(set(setting)))}
    x_N = np.array(read if signed else [coded[text] for text in setting])
    y_N = np.asarray(outcome, dtype=float)
    n, measure = len(x_N), correlation if signed else ratio
    if n < 2 or len(set(x_N.tolist())) < 2 or len(set(y_N.tolist())) < 2:
        return Association(math.nan, math.nan, math.nan, math.nan, signed)

    def ranks(values_RN: np.ndarray) -> np.ndarray:
        return np.asarray(rankdata(values_RN, axis=-1))

    draw = np.random.default_rng(seed)
    of_x_N = ranks(x_N) if signed else x_N
    value = float(measure(of_x_N[None], ranks(y_N)[None])[0])
    shuffled_RN = draw.permuted(np.tile(ranks(y_N), (REPETITIONS, 1)), axis=1)
    chance_R = measure(np.broadcast_to(of_x_N, shuffled_RN.shape), shuffled_RN)
    p = (1 + int((np.abs(chance_R) >= abs(value) - 1e-12).sum())) / (1 + REPETITIONS)
    again_RN = draw.integers(0, n, (REPETITIONS, n))
    x_RN = ranks(x_N[again_RN]) if signed else x_N[again_RN]
    with np.errstate(invalid="ignore", divide="ignore"):
        boot_R = measure(x_RN, ranks(y_N[again_RN]))
    boot_R = boot_R[np.isfinite(boot_R)]
    low, high = np.quantile(boot_R, [0.025, 0.975])
    return Association(value, float(low), float(high), p, signed)


def correlation(x_RN: np.ndarray, y_RN: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row: of ranks it is Spearman's."""
    x_RN = x_RN - x_RN.mean(1, keepdims=True)
    y_RN = y_RN - y_RN.mean(1, keepdims=True)
    return np.asarray((x_RN * y_RN).sum(1) / np.sqrt((x_RN**2).sum(1) * (y_RN**2).sum(1)))


def ratio(groups_RN: np.ndarray, y_RN: np.ndarray) -> np.ndarray:
    """Root of the share of the ranks' variance that lies between groups, of each row."""
    centred_RN = y_RN - y_RN.mean(1, keepdims=True)
    between_R = np.zeros(len(y_RN))
    for group in np.unique(groups_RN):
        inside_RN = groups_RN == group
        count_R = np.maximum(inside_RN.sum(1), 1)
        between_R += (centred_RN * inside_RN).sum(1) ** 2 / count_R
    return np.asarray(np.sqrt(between_R / (centred_RN**2).sum(1)))


def holm(ps: Sequence[float]) -> list[float]:
    """Raise p-values so that any of them below alpha is one at alpha over all; NaN stays out."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    raised, most = list(ps), 0.0
    for turn, place in enumerate(order):
        most = max(most, min(1.0, (len(order) - turn) * ps[place]))
        raised[place] = most
    return raised


def importance_table(sweep: Sweep, compared: Sequence[Trial]) -> Table:
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
    return Table(
        title,
        (*names, *(axis.title for axis in sweep.axes)),
        tuple(rows) if n > 2 else (),  # of two trials the ranks agree, or disagree, wholly
        words=("setting",),
        notes=(NOTE, *((few,) if n < ENOUGH else ())),
    )


def column(keys: Sequence[str], compared: Sequence[Trial], axis: Objective) -> list[str]:
    """Write one objective's associations, with what they allow to say."""
    outcome = [value for trial in compared if (value := trial.value(axis.metric)) is not None]
    found = [
        associate([trial.run.params.get(key, "-") for trial in compared], outcome) for key in keys
    ]
    raised = holm([each.p for each in found])
    return [
        told(each, p, enough=len(compared) >= ENOUGH) for each, p in zip(found, raised, strict=True)
    ]


def told(found: Association, p: float, *, enough: bool) -> str:
    """Write an association; without trials enough, or a p below alpha, it claims nothing."""
    if math.isnan(found.value):
        return "one value only"
    sign = "+" if found.signed else ""
    text = f"{found.value:{sign}.2f} ({found.low:{sign}.2f} to {found.high:{sign}.2f})"
    if not enough:
        return f"{text}, too few"
    chance = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{text}, {chance}" + ("" if p < ALPHA else ": may be chance")
