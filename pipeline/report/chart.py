"""Plots of report and sweep: what they share, and robust accuracy over cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import IO, Any

from pipeline.presets.paper_grid import ROWS
from pipeline.report.grouping import ReportBlock
from pipeline.report.statistics import Estimate

CYCLE = ("C5", "C6", "C8", "C9")  # of rows that name no color of their own
COLUMNS = 4
PLAIN = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "text.parse_math": False}


def spread(share: Estimate | None) -> tuple[float, float]:
    """Return how far an interval reaches below and above its mean, in percent; 0 without one."""
    if share is None or math.isnan(share.low):
        return 0.0, 0.0
    return 100 * (share.mean - share.low), 100 * (share.high - share.mean)


def draw_shares(axes: Any, x: Sequence[float], shares: Sequence[Estimate], **style: Any) -> Any:
    """Draw shares in percent with their 95% intervals; return the handle for a legend."""
    reach = list(zip(*map(spread, shares), strict=True))
    y = [100 * share.mean for share in shares]
    return axes.errorbar(x, y, yerr=reach, **{"capsize": 3, "markersize": 6, **style})


def tidy(axes: Any, grid: str = "both") -> None:
    """Leave out frame lines that say nothing, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis=grid)


def save(figure: Any, path: Path | IO[Any], kind: str = "png") -> None:
    """Write a figure, the same bytes for the same numbers."""
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(path, format=kind, dpi=150, metadata=none if kind == "svg" else {})


def plot_over_cost(blocks: Sequence[ReportBlock], path: Path) -> None:
    """Draw each block's rows: worst robust accuracy with its 95% interval over GMAC.

    Rows of equal cost are drawn a little apart.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(blocks))
    lines = -(-len(blocks) // columns)
    width = max(5.0, 3.7 * columns)
    figure = Figure(figsize=(width, 3.3 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes in grid.flat[len(blocks) :]:
        axes.set_visible(False)
    for axes, block in zip(grid.flat, blocks, strict=False):
        draw_block(axes, block, handles)
    for axes in grid[:, 0]:
        axes.set_ylabel("RA, worst of all attacks (%)")
    longest = max(map(len, handles), default=0)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(1, int(width / (0.09 * longest + 0.7))),
        frameon=False,
    )
    save(figure, path)


def draw_block(axes: Any, block: ReportBlock, handles: dict[str, Any]) -> None:
    """Draw one block, and add its rows to the legend."""
    others = cycle(CYCLE)
    rows = [
        (row, share, gmac)
        for row in block.rows
        if (share := row.share("test/ra_worst")) and (gmac := row.mean("cost/gmac")) is not None
    ]
    widest = max((gmac for _, _, gmac in rows), default=1.0)
    taken: Counter[float] = Counter()
    for row, share, gmac in rows:
        known = ROWS.get(row.kind)
        color, marker = (known.color, known.marker) if known else ("", "P")
        color = color or next(others)
        slot = round(gmac / widest, 2)
        x = gmac + 0.02 * widest * taken[slot]
        taken[slot] += 1
        handle = draw_shares(axes, [x], [share], color=color, marker=marker, linestyle="none")
        handles.setdefault(row.title, handle)
        if row.kind == "dense":
            axes.axhline(100 * share.mean, color=color, linewidth=0.8, linestyle=":")
    axes.set_title("\n".join(filter(None, (block.title, fill(block.apart, 44)))), fontsize=9)
    axes.set_xlabel("GMAC per image, router included")
    axes.set_xlim(0, 1.1 * widest)
    axes.margins(y=0.15)
    tidy(axes)
