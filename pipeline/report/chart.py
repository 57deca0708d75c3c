"""The plot of robust accuracy over cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

from pipeline.presets.paper_grid import ROWS
from pipeline.report.grouping import ReportBlock
from pipeline.report.statistics import Estimate

STYLES = dict(
    zip(
        ROWS,
        (("C7", "s"), ("C0", "v"), ("C2", "^"), ("C1", "D"), ("C3", "o"), ("C4", "X")),
        strict=True,
    )
)
OTHER_COLORS = ("C5", "C6", "C8", "C9")
COLUMNS = 4


def plot_over_cost(blocks: Sequence[ReportBlock], path: Path) -> None:
    """Draw each block's rows: worst robust accuracy with its 95% interval over GMAC.

    Rows of one cost stand side by side, a hair apart.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(blocks))
    lines = -(-len(blocks) // columns)
    width = max(5.0, 3.7 * columns)
    figure = Figure(figsize=(width, 3.3 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for place, axes in enumerate(grid.flat):
        if place < len(blocks):
            draw_block(axes, blocks[place], handles)
        else:
            axes.set_visible(False)
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
    figure.savefig(path, dpi=150)


def draw_block(axes: Any, block: ReportBlock, handles: dict[str, Any]) -> None:
    """Draw one block, and add its rows to the legend."""
    others = cycle(OTHER_COLORS)
    points = [
        (row, share, gmac)
        for row in block.rows
        if (share := row.share("test/ra_worst")) and (gmac := row.mean("cost/gmac")) is not None
    ]
    widest = max((gmac for _, _, gmac in points), default=1.0)
    taken: Counter[float] = Counter()
    for row, share, gmac in points:
        color, marker = STYLES.get(row.kind) or (next(others), "P")
        slot = round(gmac / widest, 2)
        handle = axes.errorbar(
            [gmac + 0.02 * widest * taken[slot]],
            [100 * share.mean],
            yerr=spread(share),
            color=color,
            marker=marker,
            markersize=6,
            capsize=3,
            linestyle="none",
        )
        taken[slot] += 1
        handles.setdefault(row.title, handle)
        if row.kind == "dense":
            axes.axhline(100 * share.mean, color=color, linewidth=0.8, linestyle=":")
    axes.set_title("\n".join(filter(None, (block.title, fill(block.apart, 44)))), fontsize=9)
    axes.set_xlabel("GMAC an image, router included")
    axes.set_xlim(0, 1.1 * widest)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def spread(share: Estimate) -> list[list[float]] | None:
    """How far the interval reaches below and above, in percent; None where there is none."""
    if share.low != share.low:
        return None
    return [[100 * (share.mean - share.low)], [100 * (share.high - share.mean)]]
