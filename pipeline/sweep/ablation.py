"""Ablation: trials by the values of one setting, or of a few in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.grouping import ResultRow
from pipeline.report.runs import number
from pipeline.report.statistics import Difference, difference
from pipeline.report.tables import FOOT, TextTable, percent, points, share_columns
from pipeline.sweep.trial_tables import columns_of, cost, short_keys, shown
from pipeline.sweep.trials import COSTS, Sweep, Trial, title_of


@dataclass(frozen=True)
class Ablation:
    """The trials of a sweep by the values of its one setting.

    Attributes:
        keys: The setting, or several that change together.
        rows: One per value, in order: its trials are seeds.
        metrics: Shares that some trial has.
        notes: Other settings in which the trials differ.
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


def ablation_table(found: Ablation) -> TextTable:
    """Lay out values against the shares that they reach, and the worst case less the first's."""
    aim = "val/ra_worst" if "val/ra_worst" in found.metrics else found.metrics[-1]
    costs = [name for name in COSTS if any(row.mean(name) is not None for row in found.rows)]
    first = found.rows[0].share(aim)
    gains: list[Difference | None] = [None]
    for row in found.rows[1:]:
        own = row.share(aim)
        gains.append(difference(own, first) if own and first else None)
    lines = (
        (
            *(value, str(len(row.runs))),
            *(percent(row.share(m), interval=True) for m in found.metrics),
            *(points(gain), *(cost(name, row.mean(name)) for name in costs)),
        )
        for value, row, gain in zip(found.values, found.rows, gains, strict=True)
    )
    used = {gain.over for gain in gains if gain}
    shares = map(title_of, found.metrics)
    return TextTable(
        f"Ablation of {found.name}",
        (found.name, "n", *shares, f"{title_of(aim)} - first", *map(title_of, costs)),
        tuple(lines),
        notes=(
            "Percent of validation images with 95% intervals: over images where n is 1, over seeds "
            "(Student's t) where it is more.",
            *(f"Differences in points, {text}." for over, text in FOOT.items() if over in used),
            *found.notes,
        ),
        words=(found.name,),
    )


def ablation_records(found: Ablation) -> list[dict[str, object]]:
    """Write an ablation as records for CSV."""
    records = []
    for row in found.rows:
        record: dict[str, object] = {k: row.runs[0].params.get(k, "") for k in found.keys}
        record |= {"n": len(row.runs), "seeds": " ".join(str(run.seed) for run in row.runs)}
        for metric in found.metrics:
            record |= share_columns(metric, row.share(metric), ("mean", "std", "low", "high"))
        record |= {name: row.mean(name) for name in COSTS}
        records.append(record | {"runs": " ".join(run.run_id for run in row.runs)})
    return records
