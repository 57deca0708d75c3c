"""The picture of a sweep: robust over standard accuracy, coloured by cost, and over cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.report.chart import spread
from pipeline.sweep.pareto import front_of
from pipeline.sweep.trials import Objective, Sweep, Trial, is_share

COLORS = "viridis"
BRIGHTEST = 0.88  # of the colour map: its yellow end is lost on white
FAINT, STEP = "#767676", "#444444"
ON, BEATEN = "on the front, with 95% intervals", "beaten by another trial"
STOPPED, INFEASIBLE = "stopped early (robust under PGD alone)", "infeasible, not trained"
STYLES: Mapping[str, Mapping[str, Any]] = {
    ON: {"marker": "o", "markersize": 8.5, "markeredgecolor": "black", "zorder": 4},
    BEATEN: {"marker": "s", "markersize": 5, "alpha": 0.6, "zorder": 3},
    STOPPED: {
        **{"marker": "v", "markersize": 5, "markerfacecolor": "none"},
        **{"color": FAINT, "alpha": 0.7, "zorder": 1},
    },
    INFEASIBLE: {"marker": "x", "markersize": 6, "color": FAINT, "alpha": 0.8, "zorder": 1},
}
PLAIN = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "text.parse_math": False}
NEAR = 14.0  # points; a label closer than that to another thing moves on
PLACES = ((0, 8), (11, 5), (-11, 5), (11, -9), (-11, -9), (0, -15), (22, -3), (-22, -3))


@dataclass(frozen=True)
class Frame:
    """What the picture shows: its two accuracies, the cost, and which trials are what."""

    x: Objective
    y: Objective
    cost: Objective
    front: Sequence[Trial]
    compared: Sequence[Trial]
    stopped: Sequence[Trial]
    infeasible: Sequence[Trial]

    def color(self, trial: Trial) -> Any:
        """Colour of a trial: dark is cheap."""
        from matplotlib import colormaps

        costs = [v for t in self.compared if (v := t.value(self.cost.metric)) is not None]
        value = trial.value(self.cost.metric)
        if value is None:
            return FAINT
        low, high = min(costs), max(costs)
        return colormaps[COLORS](BRIGHTEST * (value - low) / (high - low) if high > low else 0.4)


def frame_of(sweep: Sweep, front: Sequence[Trial], compared: Sequence[Trial]) -> Frame:
    """Choose the axes: the robust share upwards, another objective across, a cost as colour."""
    y = next((axis for axis in sweep.axes if "/ra" in axis.metric), sweep.axes[-1])
    rest = [axis for axis in sweep.axes if axis != y]
    costs = [axis for axis in rest[1:] if axis.metric.startswith("cost/")]
    cost = costs[0] if costs else Objective("cost/gmac", "min")
    return Frame(
        rest[0], y, cost, front, compared, sweep.having("stopped"), sweep.having("infeasible")
    )


def draw_front(frame: Frame, places: Mapping[str, int], path: Path | IO[str], kind: str) -> None:
    """Draw the front.

    Args:
        places: Position of each trial, by its number: it names the trial's marks in an SVG.
        kind: ``png`` or ``svg``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLAIN):
        figure = Figure(figsize=(10.4, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        for axes, across, panel in ((left, frame.x, "a"), (right, frame.cost, "b")):
            draw_panel(axes, frame, across, places, panel)
        draw_legend(figure, frame)
        left.set_ylabel(label(frame.y))
        draw_scale(figure, right, frame)
        figure.canvas.draw()  # labels are placed in the picture's own units
        for axes, across in ((left, frame.x), (right, frame.cost)):
            label_points(axes, frame, across)
        save(figure, path, kind)


def save(figure: Any, path: Path | IO[str], kind: str) -> None:
    """Write a figure, the same for the same numbers."""
    figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})


def draw_legend(figure: Any, frame: Frame) -> None:
    """Explain the marks that are there, below the picture."""
    from matplotlib.lines import Line2D

    beaten = len(frame.compared) > len(frame.front)
    there = (ON, *((BEATEN,) if beaten else ()))
    there += (STOPPED,) if frame.stopped else ()
    there += (INFEASIBLE,) if frame.infeasible else ()
    shown = [Line2D([], [], linestyle="none", **{"color": "#555555", **STYLES[n]}) for n in there]
    shown.append(Line2D([], [], color=STEP, linewidth=1.0))
    names = (*there, "best of the front for these two alone")
    figure.legend(
        shown,
        names,
        loc="outside lower center",
        ncols=min(3, len(names)),
        frameon=False,
        fontsize=9,
    )


def draw_panel(
    axes: Any, frame: Frame, across: Objective, places: Mapping[str, int], panel: str
) -> None:
    """Draw every trial over one objective."""

    def mark(trial: Trial, x: float, y: float, name: str, **style: Any) -> None:
        (drawn,) = axes.plot([x], [y], linestyle="none", **{**STYLES[name], **style})
        drawn.set_gid(f"{panel}-{places[trial.number]}")

    draw_step(axes, frame, across)
    for trial in frame.stopped:
        if (found := at_stop(trial, across, frame.y)) is not None:
            mark(trial, *found, STOPPED)
    names = {trial.number for trial in frame.front}
    for trial in frame.compared:
        point = at(trial, across, frame.y)
        if not any(map(math.isnan, point)):
            on = trial.number in names
            if on:
                draw_interval(axes, trial, point, across, frame.y)
            mark(trial, *point, ON if on else BEATEN, color=frame.color(trial))
    if across.metric.startswith("cost/"):
        low = axes.get_xaxis_transform()  # upwards in parts of the panel
        for trial in frame.infeasible:
            if (value := trial.value(across.metric)) is not None:
                mark(trial, value, 0.02, INFEASIBLE, transform=low)
        axes.set_xlim(left=0)
    axes.set_xlabel(label(across))
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def draw_step(axes: Any, frame: Frame, across: Objective) -> None:
    """Draw what the front attains of two objectives alone: a stair down from its best members."""
    able = [t for t in frame.front if not any(map(math.isnan, at(t, across, frame.y)))]
    stair = sorted(at(trial, across, frame.y) for trial in front_of(able, (across, frame.y)))
    if len(stair) > 1:
        where = "pre" if across.mode == "max" else "post"
        axes.step(*zip(*stair, strict=True), where=where, color=STEP, linewidth=1.0, zorder=2)


def draw_interval(
    axes: Any, trial: Trial, point: tuple[float, float], across: Objective, up: Objective
) -> None:
    """Draw the 95% intervals of the shares behind a point."""
    ends: dict[str, Any] = {}
    for name, objective in (("xerr", across), ("yerr", up)):
        share = trial.share(objective.metric) if is_share(objective.metric) else None
        if share is not None and (reach := spread(share)) is not None:
            ends[name] = reach
    if ends:
        axes.errorbar(
            *([v] for v in point), **ends, fmt="none", ecolor="#999999", elinewidth=0.8,
            alpha=0.55, zorder=2.5,
        )  # fmt: skip


def at(trial: Trial, across: Objective, up: Objective) -> tuple[float, float]:
    """Where a trial lies; NaN where it has no number."""
    return place_of(trial.value(across.metric), across), place_of(trial.value(up.metric), up)


def at_stop(trial: Trial, across: Objective, up: Objective) -> tuple[float, float] | None:
    """Where a trial that was stopped lies: robust under PGD, all that is known of it."""
    known = trial.value(up.metric)
    robust = trial.value("val/ra") if known is None else known
    value = trial.value(across.metric)
    if value is None or robust is None:
        return None
    return place_of(value, across), place_of(robust, up)


def place_of(value: float | None, objective: Objective) -> float:
    """Turn a value into the axis' unit: shares in percent."""
    if value is None:
        return math.nan
    return 100 * value if is_share(objective.metric) else value


def label(objective: Objective) -> str:
    """Name an axis with its unit."""
    if is_share(objective.metric):
        return f"{objective.title} (% of images)"
    return {"GMAC": "cost of an image (GMAC)"}.get(objective.title, objective.title)


def label_points(axes: Any, frame: Frame, across: Objective) -> None:
    """Write the numbers of the front's trials beside their points, where there is room."""
    scale = axes.figure.dpi / 72
    to_pixels = axes.transData.transform
    points = [at(trial, across, frame.y) for trial in frame.compared]
    taken = [tuple(to_pixels(p)) for p in points if not any(map(math.isnan, p))]
    for trial in sorted(frame.front, key=lambda own: -at(own, across, frame.y)[1]):
        point = at(trial, across, frame.y)
        if any(map(math.isnan, point)):
            continue
        x, y = to_pixels(point)
        spots = [(x + dx * scale, y + (dy + 3) * scale, dx, dy) for dx, dy in PLACES]
        others = [spot for spot in taken if spot != (x, y)]
        free = [min((math.dist(s[:2], o) for o in others), default=math.inf) for s in spots]
        best = next((i for i, room in enumerate(free) if room > NEAR * scale), None)
        chosen = spots[free.index(max(free)) if best is None else best]
        taken.append(chosen[:2])
        axes.annotate(
            trial.number, point, xytext=chosen[2:], textcoords="offset points", ha="center",
            fontsize=8.5, zorder=5,
        )  # fmt: skip


def draw_scale(figure: Any, axes: Any, frame: Frame) -> None:
    """Draw the scale of the colours, where costs differ at all."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    costs = [v for t in frame.compared if (v := t.value(frame.cost.metric)) is not None]
    if len(set(costs)) < 2:
        return
    steps = [colormaps[COLORS](BRIGHTEST * i / 255) for i in range(256)]
    mapped = ScalarMappable(Normalize(min(costs), max(costs)), ListedColormap(steps))
    figure.colorbar(mapped, ax=axes, label=label(frame.cost), pad=0.02)
