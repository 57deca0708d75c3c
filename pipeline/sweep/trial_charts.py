"""Plots of a sweep: the front over standard accuracy and over cost, and an ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.report.chart import PLAIN, draw_shares, save, spread, tidy
from pipeline.sweep.ablation import Ablation
from pipeline.sweep.pareto import front_of
from pipeline.sweep.trials import Objective, Sweep, Trial, is_share, title_of

STEP = "#444444"
ON, BEATEN = "on the front, with 95% intervals", "beaten by another trial"
STOPPED, INFEASIBLE = "stopped early (robust under PGD alone)", "infeasible, not trained"
STYLES: Mapping[str, Mapping[str, Any]] = {
    INFEASIBLE: {"marker": "x", "s": 36, "color": "#767676", "zorder": 1},
    STOPPED: {"marker": "v", "s": 25, "facecolor": "none", "edgecolor": "#767676", "zorder": 1},
    BEATEN: {"marker": "s", "s": 25, "alpha": 0.6, "zorder": 3},
    ON: {"marker": "o", "s": 72, "edgecolors": "black", "zorder": 4},
}
LOOKS = {  # colours of Okabe and Ito, distinct without red and green
    "val/sa": ("#0072B2", "o", "-"),
    "val/ra": ("#E69F00", "s", "--"),
    "val/ra_forced": ("#CC79A7", "^", ":"),
    "val/ra_worst": ("#000000", "D", "-"),
}


@dataclass(frozen=True)
class Frame:
    """Contents of the plot: its axes, its trials by kind, and the link of each trial's marks."""

    x: Objective
    y: Objective
    cost: Objective
    trials: Mapping[str, Sequence[Trial]]
    links: Mapping[str, str]


def frame_of(
    sweep: Sweep, front: Sequence[Trial], compared: Sequence[Trial], links: Mapping[str, str]
) -> Frame:
    """Choose the axes: the robust share upwards, another objective across, a cost as colour."""
    y = next((axis for axis in sweep.axes if "/ra" in axis.metric), sweep.axes[-1])
    rest = [axis for axis in sweep.axes if axis != y]
    costs = [axis for axis in rest[1:] if axis.metric.startswith("cost/")]
    members = {trial.number for trial in front}
    trials: dict[str, Sequence[Trial]] = {
        INFEASIBLE: sweep.having("infeasible"),
        STOPPED: sweep.having("stopped"),
        BEATEN: [trial for trial in compared if trial.number not in members],
        ON: front,
    }
    return Frame(rest[0], y, (costs or [Objective("cost/gmac", "min")])[0], trials, links)


def draw_front(frame: Frame, path: Path | IO[str], kind: str) -> None:
    """Draw the front; ``kind`` is ``png`` or ``svg``."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    compared = [*frame.trials[BEATEN], *frame.trials[ON]]
    costs = [v for t in compared if (v := t.value(frame.cost.metric)) is not None] or [0.0]
    steps = mpl.colormaps["viridis"]([0.88 * i / 255 for i in range(256)])  # not yellow on white
    scale = ScalarMappable(
        Normalize(min(costs), max(costs)), LinearSegmentedColormap.from_list("costs", steps)
    )
    with mpl.rc_context(PLAIN):
        figure = Figure(figsize=(10.4, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        draw_panel(left, frame, frame.x, scale)
        draw_panel(right, frame, frame.cost, scale)
        left.set_ylabel(label(frame.y))
        handles, names = left.get_legend_handles_labels()
        handles.append(Line2D([], [], color=STEP, linewidth=1.0))
        names.append("best of the front for these two alone")
        where = {"loc": "outside lower center", "ncols": min(3, len(names)), "frameon": False}
        figure.legend(handles[::-1], names[::-1], fontsize=9, **where)
        if len(set(costs)) > 1:
            figure.colorbar(scale, ax=right, label=label(frame.cost), pad=0.02)
        save(figure, path, kind)


def draw_panel(axes: Any, frame: Frame, across: Objective, scale: Any) -> None:
    """Draw every trial over one objective."""
    for name, trials in frame.trials.items():
        if name == INFEASIBLE and not across.metric.startswith("cost/"):
            axes.scatter([], [], label=name, **STYLES[name]) if trials else None
            continue
        found = [(t, point) for t in trials if (point := at(t, across, frame.y, name)) is not None]
        if not found:
            continue
        style = dict(STYLES[name])
        if name in (ON, BEATEN):
            costs = [t.value(frame.cost.metric) for t, _ in found]
            style["color"] = [scale.to_rgba(v) if v is not None else STEP for v in costs]
        if name == INFEASIBLE:
            style["transform"] = axes.get_xaxis_transform()  # upwards in parts of the panel
        marks = axes.scatter(*zip(*(point for _, point in found), strict=True), label=name, **style)
        marks.set_urls([frame.links.get(t.number) for t, _ in found])
        if name == ON:
            draw_members(axes, [t for t, _ in found], [p for _, p in found], across, frame.y)
    if across.metric.startswith("cost/"):
        axes.set_xlim(left=0)
    axes.set_xlabel(label(across))
    axes.margins(0.12)
    tidy(axes)


def draw_members(
    axes: Any,
    trials: Sequence[Trial],
    points: Sequence[tuple[float, float]],
    across: Objective,
    up: Objective,
) -> None:
    """Draw intervals and numbers of the front's members, and the stair of their best two ways."""
    ends = {}
    for name, axis in (("xerr", across), ("yerr", up)):
        if is_share(axis.metric):
            reach = [spread(trial.share(axis.metric)) for trial in trials]
            ends[name] = list(zip(*reach, strict=True))
    style = {"fmt": "none", "ecolor": "#999999", "elinewidth": 0.8, "alpha": 0.55, "zorder": 2.5}
    axes.errorbar(*zip(*points, strict=True), **ends, **style)
    for trial, point in zip(trials, points, strict=True):
        offset = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        axes.annotate(trial.number, point, fontsize=8.5, zorder=5, **offset)
    best = {trial.number for trial in front_of(trials, (across, up))}
    pairs = zip(trials, points, strict=True)
    stair = sorted(point for trial, point in pairs if trial.number in best)
    if len(stair) > 1:
        where = "pre" if across.mode == "max" else "post"
        axes.step(*zip(*stair, strict=True), where=where, color=STEP, linewidth=1.0, zorder=2)


def at(trial: Trial, across: Objective, up: Objective, kind: str) -> tuple[float, float] | None:
    """Return where a trial is drawn, shares in percent; None where it has no number.

    A trial that was stopped knows its accuracy under PGD alone; an infeasible one has a cost, and
    is drawn at the panel's lower edge.
    """
    x, y = trial.value(across.metric), trial.value(up.metric)
    if kind == STOPPED and y is None:
        y = trial.value("val/ra")
    if kind == INFEASIBLE:
        return None if x is None else (x, 0.02)
    if x is None or y is None:
        return None
    return 100 * x if is_share(across.metric) else x, 100 * y if is_share(up.metric) else y


def label(objective: Objective) -> str:
    """Name an axis with its unit."""
    if is_share(objective.metric):
        return f"{objective.title} (% of images)"
    return {"GMAC": "cost per image (GMAC)"}.get(objective.title, objective.title)


def draw_ablation(found: Ablation, path: Path | IO[bytes]) -> None:
    """Draw every share over the values, with its interval; the cost below."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLAIN):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        for turn, metric in enumerate(found.metrics):
            shift = 0.04 * (turn - (len(found.metrics) - 1) / 2)  # so that intervals do not overlap
            color, marker, line = LOOKS.get(metric, ("#009E73", "v", "-."))
            there = [(i, own) for i, row in enumerate(found.rows) if (own := row.share(metric))]
            style = {"markersize": 5, "linewidth": 1.2, "capsize": 2, "label": title_of(metric)}
            style |= {"color": color, "marker": marker, "linestyle": line}
            draw_shares(upper, [i + shift for i, _ in there], [own for _, own in there], **style)
        upper.set_ylabel("% of validation images")
        upper.set_ylim(bottom=0)
        upper.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
        costs = [math.nan if (v := row.mean("cost/gmac")) is None else v for row in found.rows]
        lower.bar(range(len(costs)), costs, 0.5, color="#8c8c8c")
        lower.set_ylabel("GMAC\nper image")
        lower.set_xticks(range(len(found.values)), found.values)
        lower.set_xlabel(" / ".join(found.keys))
        for axes in (upper, lower):
            tidy(axes, "y")
        save(figure, path)
