"""What a model is told to others as: ``card.md``, and a claim in RobustBench's format."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.backbones import Backbone
from moe.backbones.dual import DualNetworks
from moe.backbones.mixture import NetworkMixture
from moe.routing_stats import class_load
from pipeline.algorithms import selects
from pipeline.config import Config
from pipeline.config.overrides import flatten, name_of
from pipeline.evaluation.evaluator import Findings, waterfall
from pipeline.evaluation.plots import plot_over_eps, plot_waterfall
from pipeline.evaluation.route_plots import plot_class_load, plot_flips, plot_margins
from pipeline.measures import PACKAGED
from pipeline.measures.outcomes import counts
from pipeline.measures.routing_change import flip_matrix
from pipeline.measures.sanity.verdict import Verdict

MARKS = {"pass": "pass", "fail": "**FAIL**", "skip": "skipped", "none": "-"}


def card(config: Config, found: Findings, sha256: str) -> str:
    """Describe a model in Markdown: what it is, how it does, and whether that can be believed."""
    parts = [
        [f"# {config.name}", "", *verdict_lines(found.verdict)],
        ["## Numbers", "", *table(found.metrics)],
        ["## Waterfall", "", *headline_lines(found), *waterfall_lines(found)],
        ["## Checks", "", *check_lines(found.verdict)],
        ["## Conditions", "", conditions(config, found), "", provenance(config, sha256)],
        ["```json", json.dumps(flatten(config), indent=2), "```", ""],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts)


def verdict_lines(verdict: Verdict) -> list[str]:
    """Say the verdict, and what it leaves of the number to quote."""
    lines = [f"Verdict: **{verdict.status}**" + (f": {verdict.why}" if verdict.why else ".")]
    if verdict.worst != verdict.status:
        lines.append(f"The number to quote, `test/ra_worst`, is {verdict.worst}.")
    if verdict.reading:
        lines.append(f"Read it as {verdict.reading}.")
    return lines


def table(metrics: Mapping[str, float]) -> list[str]:
    """Lay out metrics with their intervals."""
    lines = ["| metric | value | 95% interval |", "|---|---|---|"]
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")) or name.startswith("check/"):
            continue
        band = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
        shown = "" if None in band else f"{band[0]:.4f} to {band[1]:.4f}"
        lines.append(f"| {name} | {value:.6g} | {shown} |")
    return lines


def headline_lines(found: Findings) -> list[str]:
    """Name the worst case and the attack that alone leaves the fewest images standing."""
    worst_N = found.main.worst
    attacks = {name: int(hits.sum()) for name, hits in found.main.whole.items() if counts(name)}
    if worst_N is None or not attacks:
        return []
    n, hits = len(worst_N), int(worst_N.sum())
    name = min(attacks, key=lambda key: attacks[key])
    text = f"Worst case {100 * hits / n:.1f}% of {n} images, over all attacks; the strongest single"
    return [f"{text} one is `{name}` ({100 * attacks[name] / n:.1f}%).", ""]


def waterfall_lines(found: Findings) -> list[str]:
    """Say which attack breaks how many of the images that the ones before it left standing."""
    lines = ["| attack | breaks | leaves standing |", "|---|---|---|"]
    for name, broken, left in waterfall(found.main):
        title = "none: misclassified as they are" if name == "sa" else name
        lines.append(f"| {title} | {broken} | {left} |")
    return lines


def check_lines(verdict: Verdict) -> list[str]:
    """Write a line for each check, with what it saw and the bound."""
    lines = ["| check | | what was seen | bound |", "|---|---|---|---|"]
    for check in verdict.checks:
        bound = "" if check.bound is None else f"{check.bound:.4g}"
        lines.append(f"| {check.name} | {MARKS[check.status]} | {check.words} | {bound} |")
    return lines


def conditions(config: Config, found: Findings) -> str:
    """Say under which threat the numbers hold."""
    threat = found.evaluation
    robust = selects(config.algorithm) == "val/ra"
    selected = f"RA under PGD-{config.evaluation.validation_steps}" if robust else "SA"
    return (
        f"Tier {found.tier}, {len(found.job.images)} test images; each counted once, an image "
        f"misclassified without an attack as broken. Threat: {threat.norm}, eps {threat.eps:.6g}; "
        f"PGD has {threat.steps} steps of {threat.step_size:.6g}, {threat.restarts} start(s), by "
        "the true gradient of the deployed model, whose gates are hard; `ra_worst` is the share "
        "that stands against all attacks. `ra_floor` and `ra_each_*` (an attacker who sets the "
        "route at will) and `ra_noise` do not count into it. Model selected on the validation "
        f"split by {selected}; the test split had no part in that."
    ) + "".join(f" {note}" for note in found.notes)


def provenance(config: Config, sha256: str) -> str:
    """Say from what the numbers came."""
    return (
        f"Seed {config.seed}, {config.workers} worker(s), torch {torch.__version__}, "
        f"{platform.machine()}, data sha256 {sha256[:16]}, fingerprint {config.fingerprint[:16]}."
    )


def claim(config: Config, found: Findings) -> dict[str, Any]:
    """Write a model as RobustBench lists it (model_info, arXiv:2010.09670).

    What was not measured, or is not ours to say, is null: ``autoattack_acc`` without AutoAttack,
    and who published the model where.
    """
    metrics, threat = found.metrics, found.evaluation
    return {
        "link": None,
        "name": config.name,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": name_of("dataset", config.dataset),
        "venue": None,
        "architecture": architecture(config),
        "eps": fraction(threat.eps),
        "clean_acc": percent(metrics.get("test/sa")),
        "reported": percent(metrics.get("test/ra_worst")),
        "autoattack_acc": percent(metrics.get("test/ra_aa")),
        "footnote": (
            f"{threat.norm}; {len(found.job.images)} test images; reported is the worst case, "
            f"image by image, over {', '.join(name for name, *_ in waterfall(found.main)[1:])}."
        ),
        "unreliable": found.verdict.worst != "reliable",
        "adaptive": percent(adaptive_worst(found)),
    }


def adaptive_worst(found: Findings) -> float | None:
    """Share that stands against all attacks but those of the AutoAttack package; None if none."""
    hits = [h for name, h in found.main.correct.items() if counts(name) and name not in PACKAGED]
    if not hits:
        return None
    clean = [found.main.correct["sa"]] if "sa" in found.main.correct else []
    return float(torch.stack([*clean, *hits]).all(0).double().mean())


def architecture(config: Config) -> str:
    """Name the network with what decides its size."""
    return described(config.backbone)


def described(backbone: Backbone) -> str:
    """Name a backbone with what decides its size; of a dual model both halves."""
    name = name_of("backbone", backbone)
    if isinstance(backbone, DualNetworks):
        halves = f"{described(backbone.standard)}; {described(backbone.robust)}"
        return f"{name}, alpha {backbone.alpha:g} of {backbone.mix}: {halves}"
    if isinstance(backbone, NetworkMixture):
        name = f"{name} of {name_of('expert', backbone.expert)}"
    if backbone.num_experts == 1:
        return name if backbone.ratio == 1 else f"{name}, widths x {backbone.ratio:g}"
    return (
        f"{name}, {backbone.num_experts} experts of widths x {backbone.ratio:g}, "
        f"{backbone.router_scope} router"
    )


def fraction(eps: float) -> str:
    """Write a radius in 255ths where it is a small number of them."""
    tops = [top for top in range(1, 33) if abs(top / 255 - eps) < 1e-9]
    return f"{tops[0]}/255" if tops else f"{eps:g}"


def percent(share: float | None) -> str | None:
    """Write a share as the leaderboard does."""
    return None if share is None else f"{100 * share:.2f}"


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
