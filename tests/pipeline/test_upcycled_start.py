"""A run that starts from a dense one, or from timm's weights, as a mixture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe.backbones.small import Small
from moe.backbones.vit import ViT, timm_name
from pipeline import checkpoint
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.standard import Standard
from pipeline.algorithms.trades import Trades
from pipeline.attacks.pgd import PGD
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.context import Session
from pipeline.data.digits import Digits
from pipeline.loop import fit
from pipeline.measures import Evaluation

QUICK: dict[str, Any] = {
    "dataset": Digits(train_images=64, test_images=16),
    "evaluation": Evaluation(steps=2, validation_steps=1),
    "epochs": 1,
    "batch_size": 16,
}
ATTACK = PGD(steps=1)


def trained(config: Config, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Train without judging; return the best checkpoint and the events."""
    events: list[dict[str, Any]] = []
    session = Session(emit=lambda event: events.append(dict(event)))
    fit(config, folder, session, ending=lambda *_: {})
    return folder / "checkpoints" / "best", events


def change_of(events: list[dict[str, Any]]) -> float:
    (value,) = (
        event["values"]["upcycle/relative_change"]
        for event in events
        if event["kind"] == "metrics" and "upcycle/relative_change" in event["values"]
    )
    return float(value)


def test_s_dense_run_becomes_adv_moe_with_equal_outputs(tmp_path: Path) -> None:
    form: dict[str, Any] = {"ratio": 0.125}
    dense = Config(backbone=Small(num_experts=1, **form), algorithm=Trades(attack=ATTACK), **QUICK)
    best, _ = trained(dense, tmp_path / "dense")
    config = Config(
        backbone=Small(num_experts=2, **form),
        algorithm=AdvMoE(attack=ATTACK),
        upcycle=str(best),
        **QUICK,
    )
    assert config.fingerprint != override(config, {"upcycle": "", "upcycle_sha256": ""}).fingerprint
    _, events = trained(config, tmp_path / "moe")
    assert change_of(events) < 1e-6
    assert any("upcycled: logits change by" in e["text"] for e in events if e["kind"] == "note")


@pytest.mark.parametrize("renormalize", [True, False])
def test_timm_weights_become_a_mixture_that_trains(tmp_path: Path, renormalize: bool) -> None:
    torch.manual_seed(0)
    form: dict[str, Any] = {"size": "micro", "ratio": 0.125, "patch": 4}
    dense = ViT(**form).build(10, 8)
    names = dense.body.state_dict()
    for tensor in names.values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    file = tmp_path / "timm.safetensors"
    save_file({timm_name(name): tensor for name, tensor in names.items()}, file)
    backbone = ViT(num_experts=4, top_k=2, renormalize=renormalize, weights=str(file), **form)
    config = Config(backbone=backbone, algorithm=Standard(), optimizer="adam", lr=1e-3, **QUICK)
    best, events = trained(config, tmp_path / "moe")
    assert (change_of(events) < 1e-5) == renormalize
    before = checkpoint.build_model(config)
    checkpoint.start(config, before)
    moved = checkpoint.load_model(best).state_dict()
    for name, tensor in before.state_dict().items():
        if ".mlp." in name:
            assert not torch.equal(tensor, moved[name]), name


def test_another_run_than_was_named_is_refused(tmp_path: Path) -> None:
    dense = Config(backbone=Small(num_experts=1, ratio=0.125), algorithm=Standard(), **QUICK)
    checkpoint.save(tmp_path / "a", dense, checkpoint.build_model(dense), {}, {})
    config = Config(
        backbone=Small(ratio=0.125), upcycle=str(tmp_path / "a"), upcycle_sha256="0" * 64, **QUICK
    )
    with pytest.raises(ValueError, match="not those that upcycle_sha256 names"):
        checkpoint.start(config, checkpoint.build_model(config))
    gone = override(config, {"upcycle": str(tmp_path / "b")})
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        checkpoint.start(gone, checkpoint.build_model(gone))
