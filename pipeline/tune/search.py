"""The next point of a sweep, as a function of the space, the seed and what is known."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pipeline.seeding import seed_of
from pipeline.tune.sweep_request import SweepRequest

Known = tuple[Mapping[str, Any], Mapping[str, float] | None]
"""A point, and its metrics; None while it runs, or if nothing came of it."""
Point = dict[str, Any]


def next_point(request: SweepRequest, index: int, known: Iterable[Known]) -> Point:
    """Choose the point of the trial with this number."""
    if request.search == "grid":
        names, values = list(request.grid), list(request.grid.values())
        return dict(zip(names, list(itertools.product(*values))[index], strict=True))
    seed = seed_of(request.base.seed, "search", index) % 2**32
    if request.search == "optuna":
        return suggested(request, seed, known)
    draws = np.random.RandomState(seed)  # what Tune's samplers take
    return {key: plain(domain.sample(random_state=draws)) for key, domain in request.keys.items()}


def suggested(request: SweepRequest, seed: int, known: Iterable[Known]) -> Point:
    """Ask Optuna's multi-objective TPE (arXiv:2304.11127), from all known trials.

    The study is made again from the log each time, and its sampler seeded by the trial's number:
    nothing has to be saved, and a sweep that goes on suggests what it would have. The first ten
    points are random. Trials that still run count as poor (the constant liar), which keeps two at
    a time apart.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spread = OptunaSearch.convert_search_space(dict(request.keys))
    modes = {"max": "maximize", "min": "minimize"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the liar
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(
        directions=[modes[mode] for _, mode in request.space.objectives], sampler=sampler
    )
    for point, metrics in known:
        values = [metrics[name] for name, _ in request.space.objectives] if metrics else None
        state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.RUNNING
        study.add_trial(
            optuna.trial.create_trial(
                state=state, params=dict(point), distributions=spread, values=values
            )
        )
    return dict(study.ask(spread).params)


def plain(value: Any) -> Any:
    """Turn numpy's numbers into Python's."""
    return value.item() if isinstance(value, np.generic) else value
