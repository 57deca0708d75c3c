"""Grouping of runs into blocks that may be compared, and rows that may be averaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.nearest_names import nearest
from pipeline.presets.paper_grid import PAPER, ROWS
from pipeline.report.statistics import Difference, Estimate, difference, estimate
from pipeline.tracking.queries import Run

CONDITIONS = {
    f"dataset.{name}" for name in ("train_images", "test_images", "size", "classes", "image_size")
}
OF_THE_FORM = {  # settings in which the rows of a table differ by definition
    "algorithm",
    "backbone.num_experts",
    "backbone.ratio",
    "backbone.router_scope",
    "router_lr",
    "router_schedule",
}


@dataclass
class ResultRow:
    """The runs of one setting, one a seed: a line of a table.

    Attributes:
        kind: Key of ``ROWS``, or the run's own name for anything else.
        base: The row that its differences are to, if any.
        note: Settings in which the base's runs differ, besides those of their form.
    """

    kind: str
    title: str
    runs: tuple[Run, ...]
    base: ResultRow | None = None
    note: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """Settings of its runs, less the seed."""
        return self.runs[0].settings

    @property
    def doubts(self) -> list[str]:
        """Objections of the sanity checks of its evaluations."""
        judged = [
            run.tags for run in self.runs if run.tags.get("verdict", "reliable") != "reliable"
        ]
        counts = Counter(tags["verdict"] for tags in judged)
        why = "; ".join(sorted({tags.get("verdict_why", "") for tags in judged} - {""}))
        return [
            f"{count} of {len(self.runs)} run(s) judged {verdict}" + (f" ({why})" if why else "")
            for verdict, count in counts.items()
        ]

    def share(self, metric: str) -> Estimate | None:
        """Average a share; None unless every run has it."""
        values = self._values(metric)
        ends = [self.runs[0].metrics.get(f"{metric}_{end}", math.nan) for end in ("low", "high")]
        return estimate(values, *ends) if values else None

    def mean(self, metric: str) -> float | None:
        """Average a cost; None unless every run has it."""
        values = self._values(metric)
        return sum(values) / len(values) if values else None

    def _values(self, metric: str) -> list[float]:
        whole = all(metric in run.metrics for run in self.runs)
        return [run.metrics[metric] for run in self.runs] if whole else []

    def gain(self, metric: str) -> Difference | None:
        """Subtract the base's share; None where there is none to compare with."""
        if self.base is None or self.base is self:
            return None
        own, other = self.share(metric), self.base.share(metric)
        return None if own is None or other is None else difference(own, other)


@dataclass
class ReportBlock:
    """Rows on one backbone and dataset, judged under the same threat on the same images."""

    backbone: str
    dataset: str
    conditions: dict[str, str]
    rows: list[ResultRow] = field(default_factory=list)
    apart: str = ""  # from other blocks of the same title
    over: str = "dense"  # kind of the row that the others are compared with

    @property
    def title(self) -> str:
        """Name net and data as the paper does."""
        net = PAPER["backbone"].get(self.backbone, self.backbone)
        return f"{net} on {PAPER['dataset'].get(self.dataset, self.dataset)}"

    @property
    def ra(self) -> str:
        """Metric of the robust accuracy under PGD on the cross-entropy."""
        return f"test/ra_pgd{self.conditions.get('evaluation.steps', 50)}"

    def described(self) -> str:
        """Say under which threat, and on how much data."""
        had = dict(self.conditions)
        size = {k: had.pop(f"dataset.{k}_images", "None") for k in ("train", "test")}
        images = ", ".join(f"{k} images {'all' if v == 'None' else v}" for k, v in size.items())
        data = had.pop("data", "")
        threat = (
            f"{had.pop('evaluation.norm', '?')}, eps {fraction(had.pop('evaluation.eps', '?'))}, "
            f"{had.pop('evaluation.steps', '?')} steps of "
            f"{fraction(had.pop('evaluation.step_size', '?'))}, "
            f"{had.pop('evaluation.restarts', '1')} start(s)"
        )
        rest = "".join(f", {key.rpartition('.')[2]} {value}" for key, value in had.items())
        return f"{threat}; {images}{rest}{f', data {data[:8]}' if data else ''}"


def fraction(text: str) -> str:
    """Write a radius in 255ths where it is one."""
    try:
        parts = 255 * float(text)
    except ValueError:
        return text
    whole = abs(parts * 4 - round(parts * 4)) < 1e-6
    return f"{round(parts * 4) / 4:g}/255" if whole else f"{float(text):g}"


def blocks_of(runs: Iterable[Run], over: str = "dense") -> list[ReportBlock]:
    """Group runs: blocks by net, data and threat; rows by all settings but the seed.

    Args:
        over: Kind of the rows that the others are compared with, a key of ``ROWS``.

    Raises:
        ValueError: There is no such kind.
    """
    if over not in ROWS:
        raise ValueError(
            f"over must be a row such as {', '.join(nearest(over, ROWS))}, got {over!r}"
        )
    blocks: dict[object, ReportBlock] = {}
    rows: dict[object, list[Run]] = {}
    for run in runs:
        conditions = conditions_of(run)
        key = (run.params["backbone"], run.params["dataset"], *conditions.items())
        block = ReportBlock(run.params["backbone"], run.params["dataset"], conditions, over=over)
        blocks.setdefault(key, block)
        rows.setdefault((key, *sorted(run.settings.items())), []).append(run)
    for (key, *_), members in rows.items():  # type: ignore[misc]
        members.sort(key=lambda run: run.seed)
        blocks[key].rows.append(ResultRow(kind_of(members[0]), "", tuple(members)))
    for block in blocks.values():
        block.rows.sort(key=rank)
        name_rows(block.rows)
        for row in block.rows:
            row.base, row.note = base_for(row, block.rows, over)
    for block in blocks.values():
        same = [other.conditions for other in blocks.values() if other.title == block.title]
        keys = [k for k in block.conditions if len({str(c.get(k)) for c in same}) > 1]
        block.apart = ", ".join(f"{key}={short(block.conditions[key])}" for key in keys)
    order = {axis: list(names) for axis, names in PAPER.items()}
    return sorted(
        blocks.values(),
        key=lambda block: (
            place(order["backbone"], block.backbone),
            place(order["dataset"], block.dataset),
            str(block.conditions),
        ),
    )


def conditions_of(run: Run) -> dict[str, str]:
    """Return what must be equal for numbers to be comparable at all."""
    found = {
        key: value
        for key, value in sorted(run.settings.items())
        if key in CONDITIONS or key.startswith("evaluation.")
    }
    return found | {"data": run.tags.get("dataset_sha256", "")}


def kind_of(run: Run) -> str:
    """Name the row of the tables that a run belongs to; for anything else return its own name.

    Of two networks, such as a dual model's, the experts are counted for each: that is a mixture.
    Rows that differ by their width alone are told apart by the name that the grid gives a cell.
    """
    counts = {k: v for k, v in run.params.items() if k.endswith(".num_experts")}
    mixture = int(counts.get("backbone.num_experts", 1 + bool(counts))) > 1
    narrow = float(run.params.get("backbone.ratio", "1")) < 1
    found = [
        name
        for name, row in ROWS.items()
        if run.params["algorithm"] == row.algorithm
        and row.mixture == mixture
        and (mixture or row.narrow == narrow)
    ]
    named = (name for name in found if run.name.startswith(f"{name}_"))
    return next(named, found[0] if found else run.name)


def rank(row: ResultRow) -> tuple[int, str, str]:
    """Return the place of a row in the order of the paper."""
    return (place(list(ROWS), row.kind), row.kind, str(sorted(row.settings.items())))


def place(names: Sequence[str], name: str) -> int:
    """Position of a name; unknown ones come last."""
    return names.index(name) if name in names else len(names)


def name_rows(rows: Sequence[ResultRow]) -> None:
    """Give rows the paper's titles; equal titles are followed by the settings that differ."""
    for row in rows:
        same = [other for other in rows if other.kind == row.kind]
        apart = [
            key
            for key in dict.fromkeys(key for other in same for key in other.settings)
            if len({other.settings.get(key) for other in same}) > 1
        ]
        said = ", ".join(f"{key}={short(row.settings.get(key))}" for key in apart)
        title = ROWS[row.kind].title if row.kind in ROWS else row.kind
        row.title = f"{title} [{said}]" if said else title


def short(text: str | None) -> str:
    """Shorten a long decimal, and a hash."""
    try:
        return f"{float(text or ''):g}"
    except ValueError:
        return str(text) if len(str(text)) < 64 else str(text)[:8]


def base_for(row: ResultRow, rows: Sequence[ResultRow], over: str) -> tuple[ResultRow | None, str]:
    """Find the row of a kind with the nearest settings; name the settings that differ."""
    found = [other for other in rows if other.kind == over]
    if not found:
        return None, ""
    best = min(found, key=lambda other: len(apart(row.settings, other.settings)))
    keys = apart(row.settings, best.settings)
    return best, ", ".join(
        f"{key} {short(best.settings[key])} there, {short(row.settings[key])} here" for key in keys
    )


def apart(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Name the settings that two rows both have, unequal, though their forms do not ask for it."""
    return [k for k in own if k in other and k not in OF_THE_FORM and own[k] != other[k]]
