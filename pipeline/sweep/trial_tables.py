"""A sweep's trials as tables: what the columns are, as CSV and as Markdown."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.grouping import fraction, place, short
from pipeline.report.statistics import Estimate
from pipeline.sweep.trials import COSTS, SHARES, STATUSES, Sweep, Trial, is_share, title_of

PIXELS = ("eps", "step_size")  # settings in units of [0, 1], shown in 255ths


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        links: Trial number of each row, for a page to jump to; empty where a row is no trial.
        words: Columns that hold words, not numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    links: tuple[str, ...] = ()
    words: tuple[str, ...] = ("trial", "ended")
    notes: tuple[str, ...] = ()


def front_table(sweep: Sweep, front: Sequence[Trial]) -> Table:
    """Lay out the members of the front, the most robust first."""
    ranked = ranking(sweep, front)
    return trials_table(f"Pareto front, {len(front)} trial(s)", sweep, ranked)


def others_table(sweep: Sweep, front: Sequence[Trial]) -> Table:
    """Lay out every other trial, with how it ended."""
    members = {trial.number for trial in front}
    rest = [trial for trial in sweep.trials if trial.number not in members]
    rest.sort(key=lambda trial: place(STATUSES, trial.status))
    return trials_table(f"The other trials, {len(rest)}", sweep, rest, ended=True)


def finalists_table(sweep: Sweep) -> Table:
    """Lay out the trials that were judged on the test split."""
    judged = [t for t in sweep.trials if t.value("test/sa") is not None]
    metrics = columns_of("test", judged)
    return Table(
        f"On the test split, {len(judged)} finalist(s)",
        ("trial", *map(title_of, metrics)),
        tuple((t.number, *(percent(t.share(m)) for m in metrics)) for t in judged),
        tuple(t.number for t in judged),
    )


def trials_table(
    title: str, sweep: Sweep, trials: Sequence[Trial], *, ended: bool = False
) -> Table:
    """Lay out trials: what was searched, the shares with their intervals, the costs."""
    shares = columns_of("val", sweep.trials)
    axes = [axis.metric for axis in sweep.axes]
    rest = [name for name in (*shares, *COSTS) if name not in axes]
    rest = [name for name in rest if any(t.value(name) is not None for t in sweep.trials)]
    words = ("trial", "ended") if ended else ("trial",)
    header = (*words, *map(title_of, axes), *short_keys(sweep.keys), *map(title_of, rest))
    rows = []
    for trial in trials:
        cells = [trial.number, *([outcome(trial)] if ended else [])]
        cells += [number(trial, name) for name in axes]
        cells += [shown(key, trial.run.params.get(key)) for key in sweep.keys]
        cells += [number(trial, name) for name in rest]
        rows.append(tuple(cells))
    return Table(title, header, tuple(rows), tuple(trial.number for trial in trials))


def number(trial: Trial, metric: str) -> str:
    """Write what a trial reached, in the metric's unit."""
    if is_share(metric):
        return percent(trial.share(metric))
    return cost(metric, trial.value(metric))


def columns_of(split: str, trials: Sequence[Trial]) -> list[str]:
    """Name the shares of a split that some trial has: the known ones first."""
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
    """Shorten dotted keys to their last word where that tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return tuple(w if last.count(w) == 1 else k for w, k in zip(last, keys, strict=True))


def shown(key: str, text: str | None) -> str:
    """Write a setting's value: radii in 255ths, decimals shortened."""
    if text is None:
        return "-"
    return fraction(text) if key.rpartition(".")[2] in PIXELS else short(text)


def outcome(trial: Trial) -> str:
    """Say how a trial ended."""
    return trial.status + (f": {trial.reason}" if trial.reason else "")


def percent(share: Estimate | None) -> str:
    """Write a share in percent, with its interval where there is one."""
    if share is None:
        return "-"
    if math.isnan(share.low):
        return f"{100 * share.mean:.1f}"
    return f"{100 * share.mean:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def cost(metric: str, value: float | None) -> str:
    """Write a cost in its unit."""
    if value is None:
        return "-"
    return f"{value / 1e6:.3f} M" if metric == "cost/params" else f"{value:.4g}"


def as_markdown(table: Table) -> str:
    """Write a table as Markdown; bars, line breaks and tags in its text cannot break it."""
    lines = [f"| {' | '.join(map(safe, table.header))} |"]
    lines += [f"|{''.join('---|' if name in table.words else '---:|' for name in table.header)}"]
    lines += [f"| {' | '.join(map(safe, row))} |" for row in table.rows]
    return "\n".join(lines)


def safe(text: str) -> str:
    """Take from a text what Markdown would read as its own."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", flat)


def write_csv(sweep: Sweep, front: Sequence[Trial], path: Path) -> None:
    """Write every trial with full precision: shares as fractions of 1."""
    members = {trial.number for trial in front}
    shares = [*columns_of("val", sweep.trials), *columns_of("test", sweep.trials)]
    others = [m for m in (*COSTS, *(a.metric for a in sweep.axes)) if m not in shares]
    names = ["trial", "status", "reason", "on_front", *sweep.keys]
    names += [f"{m}{end}" for m in shares for end in ("", "_low", "_high")]
    names += [*dict.fromkeys(others), "validation_images", "epochs", "seed", "commit"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "run"])
        for trial in sweep.trials:
            params = trial.run.params
            line: list[object] = [trial.number, trial.status, trial.reason]
            line += [int(trial.number in members), *(params.get(key, "") for key in sweep.keys)]
            for metric in shares:
                share = trial.share(metric)
                line += ["", "", ""] if share is None else [share.mean, share.low, share.high]
            line += [trial.value(metric) for metric in dict.fromkeys(others)]
            line += [trial.images, params.get("epochs", ""), params.get("seed", "")]
            writer.writerow([*line, trial.run.tags.get("commit", ""), trial.run.run_id])
