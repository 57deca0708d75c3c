"""Accuracy against robustness over the smoothing parameter of dual models: points and tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluation.plots import new_axes

WORST = "test/ra_worst"


@dataclass(frozen=True)
class Point:
    """A dual model at one weight of its robust half.

    Attributes:
        metrics: Of ``pipeline.evaluation.evaluator``: shares and the ends of their 95% intervals.
        verdict: Whether they can be believed.
        images: Test images.
    """

    alpha: float
    metrics: Mapping[str, float]
    verdict: str
    images: int

    @property
    def shares(self) -> dict[str, float]:
        """The accuracies, with their intervals."""
        return {name: value for name, value in self.metrics.items() if name.startswith("test/")}

    @property
    def headline(self) -> str:
        """Standard and worst robust accuracy in words."""
        return f"SA {self.shown('test/sa')}, RA worst {self.shown(WORST)}, {self.verdict}"

    def shown(self, name: str) -> str:
        """Write a share in percent with its interval; empty where it was not measured."""
        if name not in self.metrics:
            return ""
        value, low, high = (100 * self.metrics[name + end] for end in ("", "_low", "_high"))
        return f"{value:.1f} ({low:.1f}-{high:.1f})"


@dataclass(frozen=True)
class Curve:
    """A pair of halves over the weights, in ascending order.

    Attributes:
        name: ``post hoc``, ``joint``, or a run's own.
        trained: The weight that it was trained at, None for two single models.
        single: Whether it is one model beside the pairs, a single point without a weight.
    """

    name: str
    points: tuple[Point, ...]
    trained: float | None = None
    single: bool = False

    @property
    def prefix(self) -> str:
        """Of its metrics in MLflow."""
        return "test/" if self.name == "post hoc" else f"{self.name}/"


def columns(curves: Sequence[Curve]) -> list[str]:
    """Name what was measured, in the order of the attacks, the worst case last."""
    every = [name for curve in curves for point in curve.points for name in point.shares]
    names = [n for n in dict.fromkeys(every) if not n.endswith(("_low", "_high")) and n != WORST]
    return [*names, *([WORST] if WORST in every else [])]


def title(curve: Curve, point: Point) -> str:
    """Say what a row is: at the ends of a curve one half alone."""
    if curve.single:
        return f"{curve.name}, single model"
    alone = {0.0: "standard", 1.0: "robust"}.get(point.alpha)
    words = f"{alone} model alone" if alone else "dual"
    return f"{curve.name}, {words}{', as trained' if curve.trained == point.alpha else ''}"


def write_csv(curves: Sequence[Curve], path: Path) -> None:
    """Write every share with the ends of its interval, one row a weight."""
    ends = [f"{name}{end}" for name in columns(curves) for end in ("", "_low", "_high")]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["curve", "model", "alpha", "images", *ends, "verdict"])
        for curve in curves:
            for point in curve.points:
                values = [point.metrics.get(name, "") for name in ends]
                alpha = "" if curve.single else point.alpha
                about = [curve.name, title(curve, point), alpha, point.images]
                rows.writerow([*about, *values, point.verdict])


def as_markdown(curves: Sequence[Curve]) -> str:
    """Lay out the shares in percent with 95% Wilson intervals."""
    names = columns(curves)
    heads = ["model", "alpha", *(name.removeprefix("test/") for name in names), "verdict"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for curve in curves:
        for point in curve.points:
            alpha = "" if curve.single else f"{point.alpha:g}"
            cells = [title(curve, point), alpha, *map(point.shown, names)]
            lines.append(f"| {' | '.join([*cells, point.verdict])} |")
    images = curves[0].points[0].images
    note = f"Percent of {images} test images, 95% Wilson intervals; `ra_worst` is the number to"
    return "\n".join([*lines, "", f"{note} quote, over all attacks that count.", ""])


def plot_trade_off(curves: Sequence[Curve], path: Path) -> None:
    """Draw worst robust against standard accuracy, alpha at each point, with 95% intervals."""
    n = curves[0].points[0].images
    title, worst = f"Dual models over alpha ({n} test images)", "RA, worst of all attacks (%)"
    figure, axes = new_axes(title, "SA (%)", worst, (6.8, 4.8))
    for place, curve in enumerate(curves):
        drawn = [p for p in curve.points if WORST in p.metrics and "test/sa" in p.metrics]
        x, y = ([100 * p.metrics[name] for p in drawn] for name in ("test/sa", WORST))
        spread = [
            [
                [abs(100 * p.metrics[f"{name}_{end}"] - 100 * p.metrics[name]) for p in drawn]
                for end in ("low", "high")
            ]
            for name in ("test/sa", WORST)
        ]
        style = {"color": f"C{place}", "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.errorbar(
            x, y, xerr=spread[0], yerr=spread[1], elinewidth=0.4, label=curve.name, **style
        )
        for point, *at in () if curve.single else zip(drawn, x, y, strict=True):
            words = f"{point.alpha:g}"
            axes.annotate(words, at, (4, 4), textcoords="offset points", fontsize=7)
            if alone := {0.0: ("standard", "s"), 1.0: ("robust", "^")}.get(point.alpha):
                label = f"{curve.name}: {alone[0]} model alone"
                axes.plot(*at, alone[1], color=f"C{place}", markersize=9, label=label)
            if point.alpha == curve.trained:
                axes.plot(*at, "*", color=f"C{place}", markersize=13, label="joint, as trained")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
