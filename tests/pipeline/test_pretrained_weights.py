"""Runs of mixtures and transformers: from weights in a file, stopped and gone on with.

Shapes: CHW channels and sides.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe.backbones.vit import TransformerBody
from moe.mixture_of_networks import Mixture
from pipeline import checkpoint, end_of_run
from pipeline.checkpoint import build_model, load_model
from pipeline.config import Config
from pipeline.config.overrides import override
from tests.moe.backbones.test_vit import drawn, timm_shapes
from tests.pipeline.test_loop import (
    TINY,
    StopError,
    assert_equal_runs,
    ending,
    run,
    stop_at,
)

MIXTURE = override(
    TINY,
    {
        "backbone": "mixture",
        "backbone.num_experts": 3,
        "backbone.ratio": 0.0625,
        "algorithm": "trades",
        "epochs": 2,
        "ema_decay": 0.9,
        "awp_gamma": 0.01,
        "checkpoint_steps": 1,
    },
)
TRANSFORMERS = override(
    MIXTURE, {"backbone.expert": "vit", "backbone.ratio": 0.125, "backbone.num_experts": 2}
)


@pytest.fixture(autouse=True)
def cheap_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots and the timing."""
    monkeypatch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
    monkeypatch.setattr(end_of_run, "draw", lambda *_: None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """timm's weights for ViT-tiny an eighth as wide, of a grid of 4 and 5 classes."""
    file = tmp_path / "vit.safetensors"
    save_file({k: 0.05 * v for k, v in drawn(timm_shapes(24, 4, 17, 5)).items()}, file)
    return file


@pytest.mark.parametrize("algorithm", ["trades", "adv_moe"])
@pytest.mark.parametrize("gate", ["softmax", "hard"])
def test_a_mixture_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, gate: str, algorithm: str
) -> None:
    top_k = {"softmax": 2, "hard": 1}[gate]
    config = override(
        MIXTURE, {"backbone.gate": gate, "backbone.top_k": top_k, "algorithm": algorithm}
    )
    whole = ending(run(config, tmp_path / "whole"))
    with pytest.raises(StopError):
        run(config, tmp_path / "cut", stop_at("progress", 6))
    run(config, tmp_path / "cut")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert whole["cost/ratio_to_dense"] < top_k * 0.0625
    assert sum(whole[f"route/load_{expert}"] for expert in range(3)) == pytest.approx(1)
    assert 0 <= whole["test/ra_worst"] <= whole["test/sa"] <= 1
    assert isinstance(load_model(tmp_path / "cut" / "checkpoints" / "best"), Mixture)


def test_experts_start_from_the_file_and_go_on_without_it(tmp_path: Path, weights: Path) -> None:
    config = override(TRANSFORMERS, {"backbone.expert.weights": str(weights), "epochs": 1})
    model = build_model(config, 0)
    checkpoint.start(config, model)
    bodies = [m for m in model.modules() if isinstance(m, TransformerBody)]
    assert len(bodies) == 2
    for one, other in zip(
        bodies[0].blocks.parameters(), bodies[1].blocks.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert not torch.equal(bodies[0].head.weight, bodies[1].head.weight)

    whole = run(config, tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, tmp_path / "cut", stop_at("progress", 2))
    weights.unlink()
    assert ending(run(config, tmp_path / "cut")) == ending(whole)
    found = checkpoint.load_model(tmp_path / "cut" / "checkpoints" / "best")
    assert isinstance(found, Mixture)


def test_content_of_the_file_decides_the_fingerprint_and_its_place_does_not(
    tmp_path: Path, weights: Path
) -> None:
    def made(file: Path) -> Config:
        return override(TRANSFORMERS, {"backbone.expert.weights": str(file)})

    there = tmp_path / "there.safetensors"
    there.write_bytes(weights.read_bytes())
    assert made(there) != made(weights)
    assert made(there).fingerprint == made(weights).fingerprint != TRANSFORMERS.fingerprint
    save_file(drawn(timm_shapes(24, 4, 5, 5)), there)
    assert made(there).fingerprint != made(weights).fingerprint


@pytest.mark.parametrize("kind", ["missing", "another", "unfit"])
def test_file_that_is_not_what_it_was_is_refused(weights: Path, kind: str) -> None:
    config = override(TRANSFORMERS, {"backbone.expert.weights": str(weights)})
    if kind == "missing":
        weights.unlink()
    elif kind == "another":
        save_file(drawn(timm_shapes(24, 4, 5, 5)), weights)
    else:
        expert: Any = config.backbone.expert  # type: ignore[attr-defined]
        wide = replace(config.backbone, ratio=0.25, expert=expert)  # type: ignore[type-var, call-arg]
        config = replace(config, backbone=wide)
    messages = {
        "missing": "backbone.expert.weights must be a safetensors file that every worker sees",
        "another": r"backbone.expert.weights has sha256 \w{12}, but .*weights_sha256 is \w{12}",
        "unfit": r"backbone.expert.weights: cls_token has shape \(1, 1, 24\), want \(1, 1, 48\)",
    }
    model = copy.deepcopy(build_model(config, 0))
    with pytest.raises(ValueError, match=messages[kind]):
        checkpoint.start(config, model)
