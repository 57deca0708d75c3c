"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.measures.interval import wilson

Row = Mapping[str, Any]  # {"step": int, "values": {metric: number}}


def _axes(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Any, Any]:
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
    figure, axes = _axes("Training losses", "updates", "nats per image")
    names = sorted({k for row in history for k in row["values"] if k.startswith("train/loss_")})
    for name in names:
        _line(axes, *_series(history, name), label=name.removeprefix("train/loss_"))
    if names:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_accuracies(history: Sequence[Row], path: Path) -> None:
    """Draw standard and robust accuracy on the validation split over the updates."""
    figure, axes = _axes("Validation accuracy", "updates", "share of images")
    for name, label in (("val/sa", "standard (SA)"), ("val/ra", "robust (RA, PGD)")):
        _line(axes, *_series(history, name), label=label)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_over_eps(points: Sequence[tuple[float, int, int]], path: Path, *, unit: str) -> None:
    """Draw accuracy over the attack's radius, with 95% intervals."""
    n = points[0][2]
    figure, axes = _axes(f"Accuracy over eps ({n} test images)", f"eps ({unit})", "accuracy")
    scale = 255.0 if unit == "1/255" else 1.0
    shares = [hits / n for _, hits, n in points]
    bands = [wilson(hits, n) for _, hits, n in points]
    eps = [scale * radius for radius, _, _ in points]
    axes.fill_between(eps, [low for low, _ in bands], [high for _, high in bands], alpha=0.2)
    axes.plot(eps, shares, marker="o", markersize=4)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    figure.savefig(path, dpi=150)


def plot_class_load(load_KE: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw which share of each class's images goes to each expert."""
    classes, experts = load_KE.shape
    size = (max(4.0, 1.2 + 0.9 * experts), min(24.0, 1.6 + 0.3 * classes))
    figure, axes = _axes("Which expert sees which class", "expert", "", size)
    axes.grid(visible=False)
    image = axes.imshow(load_KE.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(experts))
    axes.set_yticks(range(classes), list(class_names)[:classes], fontsize=8 if classes < 30 else 4)
    if classes <= 20:
        for k in range(classes):
            for e in range(experts):
                share = float(load_KE[k, e])
                colour = "white" if share > 0.6 else "black"
                axes.text(e, k, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the class's images")
    figure.savefig(path, dpi=150)
