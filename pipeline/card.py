"""What a model is told to others as: ``card.md``, and a claim in RobustBench's format."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

from moe.backbones import Backbone
from moe.backbones.dual import DualNetworks
from moe.backbones.mixture import NetworkMixture
from pipeline.algorithms import selects
from pipeline.config import Config, flatten, name_of
from pipeline.examine import Findings, waterfall
from pipeline.measures.sanity import Verdict

MARKS = {"pass": "pass", "fail": "**FAIL**", "skip": "skipped", "none": "-"}


def card(config: Config, found: Findings, sha256: str) -> str:
    """Describe a model in Markdown: what it is, how it does, and whether that can be believed."""
    parts = [
        [f"# {config.name}", "", *verdict_lines(found.verdict)],
        ["## Numbers", "", *table(found.metrics)],
        ["## Waterfall", "", *waterfall_lines(found)],
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
    }


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
