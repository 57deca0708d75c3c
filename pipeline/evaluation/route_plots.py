"""Pictures of what an attack does to the routes.

Shapes: K classes, E experts, N images, L self-routing layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BINS = 24


def _figure(columns: int, size: tuple[float, float], title: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _cells(axes: Any, table: Tensor, *, small: bool) -> Any:
    """Draw a table of shares, each cell with its number where there is room."""
    image = axes.imshow(table.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    rows, columns = table.shape
    if rows <= 20 and columns <= 16:
        for i in range(rows):
            for j in range(columns):
                share = float(table[i, j])
                colour = "white" if share > 0.6 else "black"
                text = f"{share:.0%}" if share == 0 or share >= 0.005 else "<1%"
                axes.text(
                    j, i, text, ha="center", va="center", color=colour, fontsize=8 if small else 10
                )
    return image


def plot_class_load(loads: Mapping[str, Tensor], class_names: Sequence[str], path: Path) -> None:
    """Draw which share of each class's images goes to each expert.

    Args:
        loads: Tables (K, E) by what happened to the images: clean, attacked.
    """
    classes, experts = next(iter(loads.values())).shape
    width = 1.6 + len(loads) * max(1.7, 0.8 * experts)
    size = (max(4.5, width), min(24.0, 1.8 + 0.3 * classes))
    figure, panels = _figure(len(loads), size, "Which expert sees which class")
    for place, (axes, (title, table_KE)) in enumerate(zip(panels, loads.items(), strict=True)):
        image = _cells(axes, table_KE, small=True)
        axes.set(title=title, xlabel="expert")
        axes.title.set_fontsize(10)
        axes.set_xticks(range(experts))
        names = list(class_names)[:classes] if place == 0 else []
        axes.set_yticks(range(classes) if names else [], names, fontsize=8 if classes < 30 else 4)
    figure.colorbar(image, ax=panels, label="share of the class's images")
    figure.savefig(path, dpi=150)


def plot_flips(matrices: Mapping[str, Tensor], path: Path) -> None:
    """Draw where the images of each expert go under attack: rows sum to 1.

    Args:
        matrices: Counts (E, E) by attack.
    """
    experts = len(next(iter(matrices.values())))
    size = (1.5 + len(matrices) * max(2.6, 0.7 * experts), max(3.2, 1.6 + 0.6 * experts))
    figure, panels = _figure(len(matrices), size, "Expert before and after the attack")
    for place, (axes, (title, counts_EE)) in enumerate(zip(panels, matrices.items(), strict=True)):
        total_E1 = counts_EE.sum(1, keepdim=True)
        image = _cells(axes, counts_EE / total_E1.clamp(min=1), small=experts > 4)
        flipped = 1 - float(counts_EE.diagonal().sum() / counts_EE.sum().clamp(min=1))
        axes.set(title=f"{title}: {flipped:.1%} change", xlabel="after")
        axes.title.set_fontsize(10)
        axes.set_xticks(range(experts))
        labels = [f"{e} (n={int(total_E1[e])})" for e in range(experts)]
        axes.set_yticks(range(experts) if place == 0 else [], labels if place == 0 else [])
        if place == 0:
            axes.set_ylabel("before")
    figure.colorbar(image, ax=panels, label="share of the row")
    figure.savefig(path, dpi=150)


def plot_margins(gaps: Mapping[str, Tensor], path: Path) -> None:
    """Draw how clearly the router decides: its best score less the second, clean and attacked.

    Args:
        gaps: One number per image (N,), by what happened to the images.
    """
    figure, (axes,) = _figure(1, (6.4, 4.0), "Margin of the router")
    every = torch.cat(list(gaps.values()))
    high = float(every.quantile(0.995)) if len(every) else 1.0
    edges = torch.linspace(0, max(high, 1e-6), BINS + 1).tolist()
    for number, (title, gap_N) in enumerate(gaps.items()):
        close = float((gap_N <= 0.05 * high).float().mean())
        label = f"{title}: median {float(gap_N.median()):.3g}, {close:.1%} below {0.05 * high:.2g}"
        style: dict[str, Any] = {"color": f"C{number}", "alpha": 0.35 if number == 0 else 1.0}
        kind = "stepfilled" if number == 0 else "step"
        shares = torch.full_like(gap_N, 1 / max(1, len(gap_N))).tolist()
        values = gap_N.clamp(max=edges[-1]).tolist()
        axes.hist(values, edges, weights=shares, histtype=kind, label=label, **style)
    axes.set(xlabel="best score less the second (last bin: and above)", ylabel="share of images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
