"""Tables of the trials of a sweep, and their records for CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.report.grouping import fraction, place, short
from pipeline.report.tables import TextTable, percent, share_columns
from pipeline.sweep.trials import COSTS, SHARES, STATUSES, Sweep, Trial, is_share, title_of

PIXELS = ("eps", "step_size")  # settings in units of [0, 1], shown in 255ths


def front_table(sweep: Sweep, front: Sequence[Trial]) -> TextTable:
    """Lay out the members of the front, the most robust first."""
    ranked = ranking(sweep, front)
    return trials_table(f"Pareto front, {len(front)} trial(s)", sweep, ranked)


def others_table(sweep: Sweep, front: Sequence[Trial]) -> TextTable:
    """Lay out every other trial, with its status."""
    members = {trial.number for trial in front}
    rest = [trial for trial in sweep.trials if trial.number not in members]
    rest.sort(key=lambda trial: place(STATUSES, trial.status))
    return trials_table(f"The other trials, {len(rest)}", sweep, rest, ended=True)


def finalists_table(sweep: Sweep) -> TextTable:
    """Lay out the trials that were evaluated on the test split."""
    judged = [t for t in sweep.trials if t.value("test/sa") is not None]
    metrics = columns_of("test", judged)
    return TextTable(
        f"On the test split, {len(judged)} finalist(s)",
        ("trial", *map(title_of, metrics)),
        tuple((t.number, *(number(t, m) for m in metrics)) for t in judged),
        words=("trial",),
        keys=tuple(t.number for t in judged),
    )


def trials_table(
    title: str, sweep: Sweep, trials: Sequence[Trial], *, ended: bool = False
) -> TextTable:
    """Lay out trials: the searched settings, the shares with their intervals, the costs."""
    axes = [axis.metric for axis in sweep.axes]
    rest = [name for name in (*columns_of("val", sweep.trials), *COSTS) if name not in axes]
    rest = [name for name in rest if any(t.value(name) is not None for t in sweep.trials)]
    words = ("trial", "ended") if ended else ("trial",)
    rows = (
        (
            *(t.number, *([outcome(t)] if ended else [])),
            *(number(t, name) for name in axes),
            *(shown(key, t.run.params.get(key)) for key in sweep.keys),
            *(number(t, name) for name in rest),
        )
        for t in trials
    )
    return TextTable(
        title,
        (*words, *map(title_of, axes), *short_keys(sweep.keys), *map(title_of, rest)),
        tuple(rows),
        words=words,
        keys=tuple(trial.number for trial in trials),
    )


def number(trial: Trial, metric: str) -> str:
    """Write a metric of a trial in its unit."""
    if is_share(metric):
        return percent(trial.share(metric), interval=True)
    return cost(metric, trial.value(metric))


def columns_of(split: str, trials: Sequence[Trial]) -> list[str]:
    """Name the shares of a split that some trial has: the known ones first, the worst last."""
    known = [f"{split}/{name}" for name in SHARES]
    if split == "test":
        found = sorted({m for t in trials for m in t.run.metrics if m.startswith("test/ra")})
        known += [m for m in found if not m.endswith(("_low", "_high"))]
    there = [m for m in dict.fromkeys(known) if any(t.value(m) is not None for t in trials)]
    return sorted(there, key=lambda m: m.endswith("ra_worst"))


def ranking(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Order trials by their robust accuracy, then by the other axes."""
    axes = sorted(sweep.axes, key=lambda axis: "/ra" not in axis.metric)

    def key(trial: Trial) -> list[float]:
        values = [(axis, trial.value(axis.metric)) for axis in axes]
        return [-math.inf if v is None else axis.score(v) for axis, v in values]

    return sorted(trials, key=key, reverse=True)


def short_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Shorten dotted keys to their last word where these differ."""
    last = [key.rpartition(".")[2] for key in keys]
    return tuple(w if last.count(w) == 1 else k for w, k in zip(last, keys, strict=True))


def shown(key: str, text: str | None) -> str:
    """Write a setting's value: radii in 255ths, decimals shortened."""
    if text is None:
        return "-"
    return fraction(text) if key.rpartition(".")[2] in PIXELS else short(text)


def outcome(trial: Trial) -> str:
    """Write the status of a trial, and its reason."""
    return trial.status + (f": {trial.reason}" if trial.reason else "")


def cost(metric: str, value: float | None) -> str:
    """Write a cost in its unit."""
    if value is None:
        return "-"
    return f"{value / 1e6:.3f} M" if metric == "cost/params" else f"{value:.4g}"


def trial_records(sweep: Sweep, front: Sequence[Trial]) -> list[dict[str, object]]:
    """Write every trial as a record for CSV."""
    members = {trial.number for trial in front}
    shares = [*columns_of("val", sweep.trials), *columns_of("test", sweep.trials)]
    others = dict.fromkeys([*COSTS, *(a.metric for a in sweep.axes)])
    records = []
    for trial in sweep.trials:
        params, tags = trial.run.params, trial.run.tags
        record: dict[str, object] = {"trial": trial.number, "status": trial.status}
        record |= {"reason": trial.reason, "on_front": int(trial.number in members)}
        record |= {key: params.get(key, "") for key in sweep.keys}
        for metric in shares:
            share = trial.share(metric)
            record[metric] = "" if share is None else share.mean
            record |= share_columns(metric, share, ("low", "high"))
        record |= {m: trial.value(m) for m in others if m not in shares}
        record |= {"validation_images": trial.images, "epochs": params.get("epochs", "")}
        record |= {"seed": params.get("seed", ""), "commit": tags.get("commit", "")}
        records.append(record | {"run": trial.run.run_id})
    return records
