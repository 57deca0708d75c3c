"""The export command on untrained networks: what it writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.exported_model import ExportedModel
from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.export import __main__ as command
from pipeline.export import folder as writer
from pipeline.export.agreement import DisagreementError, check_agreement
from pipeline.export.folder import write_programs

SYNTHETIC = {
    "dataset": "synthetic",
    "dataset.size": 8,
    "dataset.classes": 4,
    "dataset.train_images": 32,
    "dataset.test_images": 24,
    "name": "tiny",
}
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"backbone.ratio": 0.125, "backbone.num_experts": 3},
    "per layer": {"backbone.ratio": 0.125, "backbone.router_scope": "per_layer"},
    "dense": {"backbone.ratio": 0.125, "backbone.num_experts": 1, "algorithm": "standard"},
    "mixture": {
        "backbone": "mixture",
        "backbone.ratio": 0.125,
        "backbone.num_experts": 3,
        "algorithm": "trades",
    },
    "dual": {
        "backbone": "dual",
        "backbone.standard.ratio": 0.125,
        "backbone.robust.ratio": 0.125,
        "algorithm": "standard",
    },
    "vit": {
        "backbone": "vit",
        "backbone.ratio": 0.125,
        "backbone.num_experts": 1,
        "algorithm": "standard",
    },
}


def saved(root: Path, kind: str) -> tuple[Path, Network]:
    """Write a checkpoint of a network whose experts all get a share of random images."""
    config = override(Config(), {**SYNTHETIC, **KINDS[kind]})
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    for norm in model.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 8, 8))
    checkpoint.save(root / "best", config, model, {}, {"stage": -1})
    return root / "best", model.eval()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four gradients in place of fifty."""

    def check(*args: Any, **settings: Any) -> Any:
        return check_agreement(*args, **settings, steps=4)

    monkeypatch.setattr(command, "check_agreement", check)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("kind", KINDS)
def test_exported_folder_answers_as_the_network_with_torch_alone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = saved(tmp_path, kind)
    assert command.run([str(source), f"to={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert ("no form sorted: every layer routes for itself" in said) == (kind == "per layer")
    x_BCHW = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.save(x_BCHW, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "sys.modules.update(dict.fromkeys(['moe', 'pipeline', 'ray', 'mlflow', 'safetensors']))\n"
        "from load import ExportedModel\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "found = {}\n"
        "with torch.no_grad():\n"
        "    for form in ExportedModel('.').config['forms']:\n"
        "        model = ExportedModel('.', form)\n"
        "        found[form] = [model(x), model(x[:1])]\n"
        f"torch.save(found, {str(tmp_path / 'y.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)
    found = torch.load(tmp_path / "y.pt")
    assert set(found) == ({"gathered"} if kind == "per layer" else {"sorted", "gathered"})
    with torch.no_grad():
        wanted = model(x_BCHW)
    for outputs in found.values():
        for (logits_BK, route), count in zip(outputs, (9, 1), strict=True):
            torch.testing.assert_close(logits_BK, wanted.logits[:count], rtol=1e-4, atol=1e-4)
            assert torch.equal(route, wanted.route[:count])


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("form", ["sorted", "gathered"])
def test_experts_in_the_wrong_order_are_refused(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = saved(tmp_path, "shared")
    write: Callable[..., Any] = writer.WRITERS[form]

    def swapped(folder: Path, model: Network, example_BCHW: torch.Tensor) -> Any:
        tree, files = write(folder, model, example_BCHW)
        if form == "sorted":
            tree["experts"].reverse()
        return tree, files

    if form == "gathered":  # the planted fault is in what is traced
        original = writer.exportable_with_route

        def reversed_filters(model: Network) -> torch.nn.Module:
            module = original(model)
            for buffer in (b for name, b in module.named_buffers() if "weight_EDCRR" in name):
                buffer.copy_(buffer.flip(0).clone())
            return module

        monkeypatch.setattr(writer, "exportable_with_route", reversed_filters)
    monkeypatch.setattr(writer, "WRITERS", {**writer.WRITERS, form: swapped})
    out = tmp_path / "out"
    assert command.run([str(source), f"to={out}", f"form={form}"]) == 1
    assert "error: no export: logits of the exported model differ" in capsys.readouterr().err
    assert not out.exists()


def test_a_changed_router_is_refused(tmp_path: Path) -> None:
    source, model = saved(tmp_path, "shared")
    config = checkpoint.load_config(source)
    write_programs(
        tmp_path, config, model, ["sorted"], labels=list("abcd"), stage=-1, say=lambda _: None
    )
    exported = ExportedModel(tmp_path)
    router = exported.parts["router"]
    exported.parts["router"] = lambda x: router(x).flip(1)
    images = config.dataset.load(0).test
    with pytest.raises(DisagreementError, match="to another expert"):
        check_agreement(model, exported, images, config.evaluation, seed=0, steps=1)


@pytest.mark.usefixtures("few_steps")
def test_card_and_hub_model_read_what_the_command_wrote(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    hub = pytest.importorskip("huggingface_hub")
    from pipeline.export.hub_model import HubModel

    source, model = saved(tmp_path, "shared")
    out = tmp_path / "out"
    assert command.run([str(source), f"to={out}", "form=sorted"]) == 0
    card = hub.ModelCard.load(out / "README.md")
    results = yaml.safe_load(card.data.to_yaml())["model-index"][0]["results"][0]
    assert [metric["type"] for metric in results["metrics"]] == ["accuracy"] * 3
    assert len(json.loads((out / "config.json").read_text())["labels"]) == 4
    x_BCHW = torch.rand(5, 3, 8, 8)
    wanted = model(x_BCHW).logits
    once = HubModel.from_pretrained(out)
    torch.testing.assert_close(once(x_BCHW).logits, wanted)
    once.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(HubModel.from_pretrained(tmp_path / "again")(x_BCHW).logits, wanted)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gathered"):
        command.run(["latest", "form=gatherd"])
    with pytest.raises(ValueError, match="form"):
        command.run(["latest", "fom=sorted"])
    with pytest.raises(ValueError, match="which run"):
        command.run([])
    source, _ = saved(tmp_path, "dense")
    with pytest.raises(ValueError, match="to must be a new folder"):
        command.run([str(source), f"to={tmp_path}"])


def test_loader_refuses_other_files_shapes_and_pixels(tmp_path: Path) -> None:
    source, model = saved(tmp_path, "shared")
    config = checkpoint.load_config(source)
    write_programs(
        tmp_path, config, model, ["sorted"], labels=list("abcd"), stage=-1, say=lambda _: None
    )
    exported = ExportedModel(tmp_path)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\)"):
        exported(torch.rand(2, 3, 9, 9))
    for bad in (2.0, -1.0, float("nan")):
        x_BCHW = torch.rand(2, 3, 8, 8)
        x_BCHW[1, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="pixels must be from 0 to 1"):
            exported(x_BCHW)
    (tmp_path / "expert_0.pt2").write_bytes((tmp_path / "expert_1.pt2").read_bytes())
    with pytest.raises(ValueError, match=r"expert_0\.pt2 has sha256"):
        ExportedModel(tmp_path)
