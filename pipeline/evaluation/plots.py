"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.measures.confidence import wilson

Row = Mapping[str, Any]  # {"step": int, "values": {metric: number}}


def new_axes(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Any, Any]:
    """Make a figure with one pair of axes, and no display."""
    from matplotlib.figure import Figure  # the figure alone: no global state, no display

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _series(history: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in history if name in row["values"]]
    return [int(row["step"]) for row in rows], [float(row["values"][name]) for row in rows]


def _line(axes: Any, steps: list[int], values: list[float], **style: Any) -> None:
    axes.plot(steps, values, marker="o" if len(steps) < 40 else None, markersize=3, **style)


def plot_losses(history: Sequence[Row], path: Path) -> None:
    """Draw every training loss over the updates."""
    figure, axes = new_axes("Training losses", "updates", "nats per image")
    names = sorted({k for row in history for k in row["values"] if k.startswith("train/loss_")})
    for name in names:
        _line(axes, *_series(history, name), label=name.removeprefix("train/loss_"))
    if names:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_accuracies(history: Sequence[Row], path: Path) -> None:
    """Draw standard and robust accuracy on the validation split over the updates."""
    figure, axes = new_axes("Validation accuracy", "updates", "share of images")
    for name, label in (("val/sa", "standard (SA)"), ("val/ra", "robust (RA, PGD)")):
        _line(axes, *_series(history, name), label=label)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_over_eps(
    points: Sequence[tuple[float, int, int]],
    path: Path,
    *,
    unit: str,
    worst: tuple[float, int, int] | None = None,
) -> None:
    """Draw accuracy under plain PGD over the attack's radius, with 95% intervals.

    Args:
        worst: Radius, images and all images of the worst case over all attacks, which the curve
            alone would flatter.
    """
    n = points[0][2]
    title = f"Accuracy over eps ({n:,} test images)"
    figure, axes = new_axes(title, f"eps ({unit})", "accuracy")
    scale = 255.0 if unit == "1/255" else 1.0
    shares = [hits / n for _, hits, n in points]
    bands = [wilson(hits, n) for _, hits, n in points]
    eps = [scale * radius for radius, _, _ in points]
    axes.fill_between(eps, [low for low, _ in bands], [high for _, high in bands], alpha=0.2)
    axes.plot(eps, shares, marker="o", markersize=4, label="PGD on the cross-entropy")
    if worst is not None:
        radius, hits, of = worst
        low, high = wilson(hits, of)
        share = hits / of
        axes.errorbar(
            [scale * radius],
            [share],
            [[max(0.0, share - low)], [max(0.0, high - share)]],
            color="C3",
            marker="s",
            markersize=5,
            capsize=3,
            linestyle="none",
            label=f"all attacks together ({of:,} images): {share:.1%}",
        )
    axes.legend(frameon=False)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    figure.savefig(path, dpi=150)


def plot_waterfall(rows: Sequence[tuple[str, int, int]], path: Path) -> None:
    """Draw what each attack, in turn, breaks of the images that those before it left standing.

    Args:
        rows: Name, images broken and images left, as ``pipeline.evaluation.evaluator.waterfall``
        counts them.
    """
    n = rows[0][1] + rows[0][2]
    size = (min(14.0, max(6.4, 1.2 * len(rows) + 2.2)), 4.2)
    title = f"What each attack breaks of what those before it left ({n:,} test images)"
    figure, axes = new_axes(title, "", "images", size)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    for place, (name, broken, left) in enumerate(rows):
        colour = "0.6" if name == "sa" else "C3"
        axes.bar(place, broken, bottom=left, color=colour, width=0.7)
        text = f"\N{MINUS SIGN}{broken}" if broken else "0"
        axes.annotate(text, (place, left + broken), (0, 3), textcoords="offset points", ha="center")
        axes.plot([place - 0.35, place + 1.35], [left, left], color="0.5", linewidth=0.8)
    left = rows[-1][2]
    axes.bar(len(rows), left, color="C0", width=0.7)
    axes.annotate(
        f"{left}\n{left / n:.1%}",
        (len(rows), left),
        (0, 3),
        textcoords="offset points",
        ha="center",
    )
    names = ["no attack" if name == "sa" else name.removeprefix("ra_") for name, *_ in rows]
    axes.set_xticks(range(len(rows) + 1), [*names, "stand"], rotation=30, ha="right")
    axes.set_ylim(0, 1.12 * n)
    figure.savefig(path, dpi=150)
