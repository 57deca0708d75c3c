"""Table and plot of a study: rows with 95% intervals as CSV, Markdown and PNG."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.evaluation.plots import new_axes
from pipeline.measures.confidence import wilson

Cell = str | int | float | tuple[float, float, float]
"""Text, a number, or a value with the ends of its 95% interval."""
Row = dict[str, Cell]


def share(hits_N: Tensor) -> tuple[float, float, float]:
    """Share of images with its 95% Wilson interval."""
    hits, n = int(hits_N.sum()), len(hits_N)
    return hits / max(n, 1), *wilson(hits, n)


def mean(value_N: Tensor) -> tuple[float, float, float]:
    """Mean over images with its 95% interval, of a normal distribution."""
    n, middle = len(value_N), float(value_N.double().mean())
    half = 1.96 * float(value_N.double().std()) / math.sqrt(n) if n > 1 else 0.0
    return middle, middle - half, middle + half


@dataclass(frozen=True)
class StudyResult:
    """What a question found.

    Attributes:
        title: Of table and plot.
        rows: Of the table; all have the same columns.
        x, y, by: Columns of the plot: one line for each value of ``by``.
        words: What the table says, in sentences.
    """

    title: str
    rows: Sequence[Row]
    x: str
    y: str
    by: str
    words: Sequence[str] = ()

    def write_csv(self, path: Path) -> None:
        """Write one column per number; intervals as three."""
        flat = []
        for row in self.rows:
            cells: dict[str, str | int | float] = {}
            for key, cell in row.items():
                ends = ("", "_low", "_high")
                parts = cell if isinstance(cell, tuple) else (cell,)
                cells |= {key + end: part for end, part in zip(ends, parts, strict=False)}
            flat.append(cells)
        names = list(dict.fromkeys(key for row in flat for key in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(flat)

    def markdown(self) -> str:
        """Lay out the table, and what it says."""
        names = list(self.rows[0])
        lines = [f"## {self.title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(shown(row[name]) for name in names)} |" for row in self.rows]
        return "\n".join([*lines, "", "Brackets: 95% intervals.", *self.words, ""])

    def plot(self, path: Path) -> None:
        """Draw ``y`` over ``x`` with intervals; bars where ``x`` is no number."""
        figure, axes = new_axes(self.title, self.x, self.y, (7.2, 4.6))
        groups = list(dict.fromkeys(str(row[self.by]) for row in self.rows))
        ticks = list(dict.fromkeys(str(row[self.x]) for row in self.rows))
        numbers = all(isinstance(row[self.x], (int, float)) for row in self.rows)
        for place, group in enumerate(groups):
            own = [row for row in self.rows if str(row[self.by]) == group and row[self.y] != ""]
            if not own:
                continue
            cells = [row[self.y] for row in own]
            triples = [c if isinstance(c, tuple) else (float(c),) * 3 for c in cells]
            y = [triple[0] for triple in triples]
            below = [max(0.0, middle - low) for middle, low, _ in triples]
            above = [max(0.0, high - middle) for middle, _, high in triples]
            style = {"color": f"C{place % 10}", "label": group, "capsize": 2}
            if numbers:
                x = [float(row[self.x]) for row in own]  # type: ignore[arg-type]
                axes.errorbar(
                    x, y, yerr=(below, above), marker="o", markersize=4, linewidth=1.2, **style
                )
            else:
                width = 0.8 / len(groups)
                at = [ticks.index(str(row[self.x])) + (place + 0.5) * width - 0.4 for row in own]
                axes.bar(at, y, width, yerr=(below, above), error_kw={"linewidth": 0.8}, **style)
        if not numbers:
            axes.set_xticks(range(len(ticks)), ticks, rotation=20, ha="right", fontsize=8)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


def shown(cell: Cell) -> str:
    """Write a cell; a value with its interval in brackets."""
    if isinstance(cell, tuple):
        return f"{cell[0]:.3g} ({cell[1]:.3g} to {cell[2]:.3g})"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
