"""One setting varied, or a few in a grid, all else held: the values beside what they reach."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.report.chart import spread
from pipeline.report.grouping import ResultRow
from pipeline.report.runs import number
from pipeline.report.statistics import difference
from pipeline.report.tables import FOOT, points
from pipeline.sweep.trial_charts import PLAIN, save
from pipeline.sweep.trial_tables import Table, columns_of, cost, percent, short_keys, shown
from pipeline.sweep.trials import COSTS, Sweep, Trial, title_of

LOOKS = {  # colours of Okabe and Ito, told apart without red and green
    "val/sa": ("#0072B2", "o", "-"),
    "val/ra": ("#E69F00", "s", "--"),
    "val/ra_forced": ("#CC79A7", "^", ":"),
    "val/ra_worst": ("#000000", "D", "-"),
}


@dataclass(frozen=True)
class Ablation:
    """The trials of a sweep by the values of its one setting.

    Attributes:
        keys: The setting, or several that change together.
        rows: One a value, in order: its trials are seeds.
        metrics: The shares that there are.
        notes: In what the trials differ besides.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    rows: tuple[ResultRow, ...]
    metrics: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name what is varied."""
        return ", ".join(short_keys(self.keys))


def ablation_of(sweep: Sweep, compared: Sequence[Trial]) -> Ablation | None:
    """Group trials by their value of the setting that was searched.

    Settings that only ever change together count as one, and so do those of a space that is named
    an ablation; the seed never counts. None where the search has more, or a single value.
    """
    keys = [key for key in sweep.keys if key != "seed"]
    taken = {trial.number: tuple(trial.run.params.get(k, "-") for k in keys) for trial in compared}
    values = set(taken.values())
    together = all(len({value[i] for value in values}) == len(values) for i in range(len(keys)))
    if len(values) < 2 or not (together or sweep.space.startswith("ablation")):
        return None
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in compared:
        groups.setdefault(taken[trial.number], []).append(trial)
    ordered = sorted(groups, key=lambda value: [in_order(text) for text in value])
    rows = tuple(ResultRow("", "", tuple(t.run for t in groups[value])) for value in ordered)
    named = [" / ".join(map(shown, keys, value)) for value in ordered]
    metrics = columns_of("val", compared)
    return Ablation(tuple(keys), tuple(named), rows, tuple(metrics), apart(rows, keys))


def in_order(text: str) -> tuple[int, float, str]:
    """Order numbers as numbers, before words."""
    value = number(text)
    return (0, value, "") if isinstance(value, float) else (1, 0.0, text)


def apart(rows: Sequence[ResultRow], keys: Sequence[str]) -> tuple[str, ...]:
    """Name the settings in which the trials differ though the sweep did not search them."""
    runs = [run for row in rows for run in row.runs]
    names = sorted({key for run in runs for key in run.settings} - set(keys))
    differing = [k for k in names if len({run.settings.get(k) for run in runs}) > 1]
    return (f"The trials differ in {', '.join(differing)} as well.",) if differing else ()


def ablation_table(found: Ablation) -> Table:
    """Lay out values against what they reach, and how far the worst case is from the first's."""
    aim = "val/ra_worst" if "val/ra_worst" in found.metrics else found.metrics[-1]
    costs = [name for name in COSTS if any(row.mean(name) is not None for row in found.rows)]
    first = found.rows[0].share(aim)
    shares = map(title_of, found.metrics)
    header = (found.name, "n", *shares, f"{title_of(aim)} - first", *map(title_of, costs))
    used: set[str] = set()
    lines = []
    for value, row in zip(found.values, found.rows, strict=True):
        own = row.share(aim)
        gain = None if row is found.rows[0] or not own or not first else difference(own, first)
        if gain is not None:
            used.add(gain.over)
        cells = [value, str(len(row.runs)), *(percent(row.share(m)) for m in found.metrics)]
        lines.append((*cells, points(gain), *(cost(name, row.mean(name)) for name in costs)))
    notes = (
        "Percent of validation images with 95% intervals: over images where n is 1, over seeds "
        "(Student's t) where it is more.",
        *(f"Differences in points, {text}." for over, text in FOOT.items() if over in used),
        *found.notes,
    )
    title = f"Ablation of {found.name}"
    return Table(title, header, tuple(lines), words=(found.name,), notes=notes)


def write_ablation(found: Ablation, path: Path) -> None:
    """Write an ablation with full precision: shares as fractions of 1."""
    ends = ("mean", "std", "low", "high")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f"{metric}_{end}" for metric in found.metrics for end in ends]
        writer.writerow([*found.keys, "n", "seeds", *names, *COSTS, "runs"])
        for row in found.rows:
            line: list[object] = [row.runs[0].params.get(key, "") for key in found.keys]
            line += [len(row.runs), " ".join(str(run.seed) for run in row.runs)]
            for metric in found.metrics:
                own = row.share(metric)
                line += ["" if own is None else getattr(own, end) for end in ends]
            line += [row.mean(name) for name in COSTS]
            writer.writerow([*line, " ".join(run.run_id for run in row.runs)])


def draw_ablation(found: Ablation, path: Path | IO[str], kind: str) -> None:
    """Draw every share over the values, with its interval; the cost below."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLAIN):
        costs = [row.mean("cost/gmac") for row in found.rows]
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        for turn, metric in enumerate(found.metrics):
            draw_share(upper, found, metric, 0.04 * (turn - (len(found.metrics) - 1) / 2))
        upper.set_ylabel("% of validation images")
        upper.set_ylim(bottom=0)
        upper.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
        places = [place for place, value in enumerate(costs) if value is not None]
        lower.bar(places, [value for value in costs if value is not None], 0.5, color="#8c8c8c")
        lower.set_ylabel("GMAC\nan image")
        lower.set_xticks(range(len(found.values)), found.values)
        lower.set_xlabel(" / ".join(found.keys))
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, axis="y")
        save(figure, path, kind)


def draw_share(axes: Any, found: Ablation, metric: str, shift: float) -> None:
    """Draw one share over the values, a hair to the side of the others."""
    color, marker, line = LOOKS.get(metric, ("#009E73", "v", "-."))
    points = [(place, row.share(metric)) for place, row in enumerate(found.rows)]
    there = [(place, own) for place, own in points if own is not None]
    reach = [spread(own) or [[0.0], [0.0]] for _, own in there]
    axes.errorbar(
        [place + shift for place, _ in there],
        [100 * own.mean for _, own in there],
        yerr=[[side[end][0] for side in reach] for end in (0, 1)],
        color=color,
        marker=marker,
        linestyle=line,
        markersize=5,
        linewidth=1.2,
        capsize=2,
        label=title_of(metric),
    )
