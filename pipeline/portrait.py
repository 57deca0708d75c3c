"""The pictures of one model, from the outcomes of its attacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moe.routing_stats import class_load
from pipeline.card import card, claim
from pipeline.config import Config
from pipeline.examine import Findings, waterfall
from pipeline.measures.outcomes import counts
from pipeline.measures.routing import flip_matrix
from pipeline.plots import plot_over_eps, plot_waterfall
from pipeline.route_plots import plot_class_load, plot_flips, plot_margins


def write_report(
    config: Config, found: Findings, folder: Path, *, class_names: Sequence[str], sha256: str
) -> None:
    """Write ``card.md``, ``claim.json`` and the plots of a model."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    unit = "1/255" if found.evaluation.norm == "linf" else "L2"
    if found.curve:
        worst_N = found.main.worst
        worst = None
        if worst_N is not None:
            worst = (found.evaluation.eps, int(worst_N.sum()), len(worst_N))
        plot_over_eps(found.curve, plots / "accuracy_over_eps.png", unit=unit, worst=worst)
    if rows := waterfall(found.main):
        plot_waterfall(rows, plots / "waterfall.png")
    if config.backbone.num_experts > 1:
        draw_routes(config, found, plots, class_names)
    (folder / "card.md").write_text(card(config, found, sha256))
    (folder / "claim.json").write_text(json.dumps(claim(config, found), indent=2) + "\n")


def draw_routes(config: Config, found: Findings, plots: Path, class_names: Sequence[str]) -> None:
    """Draw load, flips and margins, clean and under the attacks that tell most."""
    main, experts = found.main, config.backbone.num_experts
    labels_N, classes = found.job.images.labels_N, config.dataset.num_classes
    attacks = seen_by(found)
    routes = {"clean": main.route, **{name: main.outcomes[name].route_NL for name in attacks}}
    loads = {k: class_load(r, labels_N, experts, classes) for k, r in routes.items()}
    plot_class_load(loads, class_names, plots / "class_load.png")
    if not attacks:
        return
    clean = main.route.reshape(len(labels_N), -1)
    matrices = {k: flip_matrix(clean, routes[k], experts) for k in attacks}
    plot_flips(matrices, plots / "flips.png")
    gaps: dict[str, Tensor] = {"clean": main.outcomes["sa"].gap_N} if "sa" in main.outcomes else {}
    plot_margins(gaps | {k: main.outcomes[k].gap_N for k in attacks}, plots / "router_margins.png")


def seen_by(found: Findings) -> list[str]:
    """Choose the attacks to draw: the plain one, and the forced route."""
    whole = [name for name in found.main.whole if counts(name)]
    forced = [name for name in whole if name.startswith("ra_forced")]
    return list(dict.fromkeys([*whole[:1], *forced[:1]]))
