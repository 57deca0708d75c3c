"""The report of one model, on networks that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.evaluation.evaluator import Findings, examine, main_job, side_jobs
from pipeline.evaluation.model_card import architecture, claim, fraction, write_report
from pipeline.measures.runner import judge, suite
from pipeline.measures.sanity.verdict import CHECKS
from pipeline.measures.tiers import END

CPU = torch.device("cpu")
TINY = override(
    Config(),
    {
        "dataset": "synthetic",
        "dataset.size": 8,
        "dataset.classes": 4,
        "dataset.train_images": 32,
        "dataset.test_images": 16,
        "backbone.ratio": 0.125,
        "evaluation.steps": 2,
        "name": "tiny",
    },
)


def examined(config: Config) -> Findings:
    torch.manual_seed(0)
    model = checkpoint.build_model(config).eval()
    test = config.dataset.load(0).test
    dense = config.backbone.num_experts == 1
    job = main_job(test, END, suite(config.evaluation, dense=dense))

    def run(each: Any) -> Any:
        return judge(model, each.images, each.measures, seed=0, device=CPU, ids_N=each.ids_N)

    sides = {name: run(side) for name, side in side_jobs(config, job, END, curve_steps=1).items()}
    return examine(config, model, "end of a run", job, run(job), sides, CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone.router_scope": "per_layer", "backbone.num_experts": 3},
        {"algorithm": "standard", "backbone.num_experts": 1, "evaluation.norm": "l2"},
        {"algorithm": "trades", "backbone": "mixture", "backbone.num_experts": 3},
    ],
    ids=["shared", "per layer", "dense, l2", "networks as experts"],
)
def test_report_has_a_line_for_each_check_and_every_plot(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = override(TINY, changes)
    found = examined(config)
    write_report(config, found, tmp_path, class_names=list("abcd"), sha256="f" * 64)
    text = (tmp_path / "card.md").read_text()
    assert text.startswith(f"# tiny\n\nVerdict: **{found.verdict.status}**")
    for part in ("## Numbers", "## Waterfall", "## Checks", "## Conditions", "| test/ra_worst |"):
        assert part in text
    for name in CHECKS:
        assert f"\n| {name} | " in text
    chosen_by = "SA" if changes.get("algorithm") == "standard" else "RA under PGD-10"
    assert f"Model selected on the validation split by {chosen_by};" in text
    plots = {"accuracy_over_eps", "waterfall"}
    if config.backbone.num_experts > 1:
        plots |= {"class_load", "flips", "router_margins"}
    drawn = {plot.stem: plot.stat().st_size for plot in (tmp_path / "plots").glob("*.png")}
    assert drawn.keys() == plots
    assert min(drawn.values()) > 5000
    read = json.loads((tmp_path / "claim.json").read_text())
    assert read == claim(config, found)


def test_claim_has_the_fields_of_robustbench_and_null_for_what_nobody_measured() -> None:
    found = examined(TINY)
    made = claim(TINY, found)
    assert list(made)[:12] == [
        *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset"),
        *("venue", "architecture", "eps", "clean_acc", "reported", "autoattack_acc"),
    ]
    assert made["clean_acc"] == f"{100 * found.metrics['test/sa']:.2f}"
    assert made["reported"] == f"{100 * found.metrics['test/ra_worst']:.2f}"
    assert made["eps"] == "8/255"
    assert made["unreliable"] == (found.verdict.worst != "reliable")
    assert made["adaptive"] == made["reported"], "no attack of the AutoAttack package was made"
    assert [key for key, value in made.items() if value is None] == [
        *("link", "authors", "venue", "autoattack_acc")
    ]


def test_names_of_radius_and_architecture() -> None:
    assert [fraction(eps) for eps in (8 / 255, 0.1, 0.5, 0.0)] == ["8/255", "0.1", "0.5", "0"]
    assert architecture(TINY) == "small, 2 experts of widths x 0.125, shared router"
    dense = override(TINY, {"algorithm": "standard", "backbone.num_experts": 1})
    assert architecture(dense) == "small, widths x 0.125"
    networks = override(TINY, {"backbone": "mixture", "backbone.expert": "resnet18"})
    assert architecture(networks) == (
        "mixture of resnet18, 2 experts of widths x 0.125, shared router"
    )
