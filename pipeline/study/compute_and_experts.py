"""Robustness at equal compute and at equal parameters, and against the number of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.cost import cost
from moe.network import Network
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.study.findings import Row, StudyResult, share
from pipeline.study.subjects import StudySettings, Subject, auto_pgd, correct, small_steps

SPARSE, SAME_MACS, SAME_PARAMETERS = "mixture", "dense, equal MACs", "dense, equal parameters"


def compute_variants(config: Config, seeds: int) -> dict[str, list[Config]]:
    """Make the runs that ``compute`` compares: a mixture and its dense twins, ``seeds`` of each.

    The twins' MLPs are as wide in every block as makes the MACs, or the parameters, those of the
    mixture, to the nearest unit of the hidden layer.
    """
    forms = {
        SPARSE: {},
        SAME_MACS: dense_form(config, "gmac"),
        SAME_PARAMETERS: dense_form(config, "params"),
    }
    return {name: repeated(config, name, form, seeds) for name, form in forms.items()}


def dense_form(config: Config, quantity: str) -> dict[str, Any]:
    """Find the hidden width with which the dense twin has the mixture's MACs or parameters."""

    def counted(changes: dict[str, Any]) -> float:
        changed = override(config, changes)
        with torch.device("meta"):
            data = changed.dataset
            net = changed.backbone.build(data.num_classes, data.image_size)
            return float(getattr(cost(net, data.image_size), quantity))

    one, two = ({"backbone.num_experts": 1, "backbone.hidden": h} for h in (4.0, 8.0))
    low, high, want = counted(one), counted(two), counted({})
    hidden = 4.0 + 4.0 * (want - low) / (high - low)  # both are affine in the width
    return {"backbone.num_experts": 1, "backbone.hidden": round(hidden, 4)}


def experts_variants(config: Config, settings: StudySettings) -> dict[str, list[Config]]:
    """Make the runs that ``experts`` compares: E and k of the settings."""
    found = {}
    for top_k in settings.top_k:
        for experts in settings.num_experts:
            if top_k <= experts or experts == 1 == top_k:
                name = f"E={experts}, k={top_k}"
                form = {"backbone.num_experts": experts, "backbone.top_k": top_k}
                found[name] = repeated(config, name, form, settings.seeds)
    return found


def repeated(config: Config, name: str, form: dict[str, Any], seeds: int) -> list[Config]:
    """Make a run of a form for each seed."""
    slug = "".join(c if c.isalnum() else "_" for c in name)
    return [
        override(config, {**form, "seed": seed, "name": f"{config.name}_{slug}"})
        for seed in range(seeds)
    ]


def accuracies(subject: Subject, settings: StudySettings) -> dict[float, dict[str, Tensor]]:
    """Attack a model at each radius: which images stand, by attack."""
    found = {}
    for eps in (0.0, *settings.eps):

        def work(
            x_BCHW: Tensor, y_B: Tensor, index_B: Tensor, m: Network = subject.model, e: float = eps
        ) -> dict[str, Tensor]:
            clean_B = correct(m, x_BCHW, y_B)
            if not e:
                return {"PGD": clean_B, "APGD": clean_B}
            x_pgd = small_steps(m, x_BCHW, y_B, e / 255, settings)
            x_apgd = auto_pgd(m, x_BCHW, y_B, index_B, e / 255, settings.steps)
            return {
                "PGD": clean_B & correct(m, x_pgd, y_B),
                "APGD": clean_B & correct(m, x_apgd, y_B),
            }

        found[eps] = subject.over(work)
    return found


def _compared(subjects: Sequence[Subject], settings: StudySettings, title: str) -> StudyResult:
    """Tabulate accuracy over eps for each variant; images of all its seeds together."""
    hits: dict[tuple[str, float], list[dict[str, Tensor]]] = {}
    about: dict[str, Row] = {}
    for subject in subjects:
        size = subject.config.dataset.image_size
        counted = cost(subject.model, size)
        about[subject.group] = {
            "GMAC": round(counted.gmac, 4),
            "parameters (M)": round(counted.params / 1e6, 3),
        }
        for eps, found in accuracies(subject, settings).items():
            hits.setdefault((subject.group, eps), []).append(found)
    rows: list[Row] = []
    for (group, eps), parts in hits.items():
        pooled = {key: torch.cat([part[key] for part in parts]) for key in ("PGD", "APGD")}
        by_seed = [float(part["APGD"].double().mean()) for part in parts]
        rows.append(
            {
                "model": group,
                **about[group],
                "trainings": len(parts),
                "eps (1/255)": eps,
                f"accuracy, PGD-{settings.steps}": share(pooled["PGD"]),
                "accuracy, APGD": share(pooled["APGD"]),
                "APGD by seed": " ".join(f"{100 * value:.1f}" for value in by_seed),
            }
        )
    words = ["Intervals are over images, not over trainings; those are the last column."]
    return StudyResult(title, rows, "eps (1/255)", "accuracy, APGD", "model", words)


def compute(subjects: Sequence[Subject], settings: StudySettings) -> StudyResult:
    """Compare models at equal compute and at equal parameters over the radius."""
    return _compared(subjects, settings, "Mixture and dense twins over eps")


def experts(subjects: Sequence[Subject], settings: StudySettings) -> StudyResult:
    """Compare numbers of experts and of experts per token over the radius."""
    return _compared(subjects, settings, "Number of experts over eps")
