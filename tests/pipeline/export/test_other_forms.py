"""Compiled packages and ONNX files of an export, each run by the process that would use it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe.exported_model import ExportedModel
from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.export.folder import write_programs

SIZE = 8
NETS: dict[str, dict[str, object]] = {
    "small": {"backbone.ratio": 0.125, "backbone.num_experts": 3},
    "mixture": {
        "backbone": "mixture",
        "backbone.ratio": 0.125,
        "backbone.num_experts": 2,
        "algorithm": "trades",
    },
    "vit": {
        "backbone": "vit",
        "backbone.ratio": 0.125,
        "backbone.num_experts": 1,
        "algorithm": "standard",
    },
}
ALONE = """
import importlib.util, sys
import torch
sys.modules.update(dict.fromkeys(["moe", "pipeline", "ray", "mlflow", "safetensors"]))
spec = importlib.util.spec_from_file_location("load", sys.argv[1] + "/load.py")
load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load)
x_BCHW = torch.load(sys.argv[2] + "/x.pt")
with torch.no_grad():
    model = load.ExportedModel(sys.argv[1], sys.argv[3])
    torch.save([model(x_BCHW), model(x_BCHW[:1])], sys.argv[2] + "/y.pt")
"""


def network(name: str) -> tuple[Config, Network]:
    """Make a network whose experts all get a share of random images."""
    own = {"dataset": "synthetic", "dataset.size": SIZE, "dataset.classes": 4, "name": "tiny"}
    config = override(Config(), {**own, **NETS[name]})
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    for norm in model.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(64, 3, SIZE, SIZE))
    return config, model.eval()


def written(folder: Path, name: str, forms: list[str]) -> tuple[Network, list[str]]:
    """Write these forms; return the network and what was said."""
    config, model = network(name)
    said: list[str] = []
    folder.mkdir()
    write_programs(folder, config, model, forms, labels=list("abcd"), stage=-1, say=said.append)
    return model, said


def images() -> torch.Tensor:
    return torch.rand(9, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def answers_alone(folder: Path, form: str, tmp_path: Path) -> list[tuple[torch.Tensor, ...]]:
    """Answer in a process of another folder that has torch and nothing of this project."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save(images(), elsewhere / "x.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(folder), str(elsewhere), form]
    subprocess.run(command, cwd=elsewhere, check=True, timeout=300)
    found: list[tuple[torch.Tensor, ...]] = torch.load(elsewhere / "y.pt")
    return found


def check_answers(model: Network, found: list[tuple[torch.Tensor, ...]]) -> None:
    with torch.no_grad():
        wanted = model(images())
    for (logits_BK, route_B), count in zip(found, (9, 1), strict=True):
        torch.testing.assert_close(logits_BK, wanted.logits[:count], rtol=1e-4, atol=1e-4)
        assert torch.equal(route_B, wanted.route[:count])


def test_programs_load_in_an_isolated_process(tmp_path: Path) -> None:
    model, said = written(tmp_path / "out", "small", ["sorted"])
    assert not said
    check_answers(model, answers_alone(tmp_path / "out", "sorted", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_compiled_packages_load_in_an_isolated_process(name: str, tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("AOTInductor needs a C++ compiler")
    model, said = written(tmp_path / "out", name, ["compiled"])
    assert not said
    check_answers(model, answers_alone(tmp_path / "out", "compiled", tmp_path))


@pytest.mark.parametrize("name", NETS)
def test_onnx_files_answer_as_the_network(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, said = written(tmp_path / "out", name, ["sorted", "onnx"])
    assert not said
    exported = ExportedModel(tmp_path / "out")
    files: dict[str, str] = exported.config["onnx"]["files"]
    for part, file in files.items():
        session = runtime.InferenceSession(
            tmp_path / "out" / file, providers=["CPUExecutionProvider"]
        )
        (feed,) = (found.name for found in session.get_inputs())
        exported.parts[part] = lambda x, run=session.run, feed=feed: torch.from_numpy(
            run(None, {feed: x.numpy()})[0]
        )
    check_answers(model, [exported(images()), exported(images()[:1])])


def test_a_form_whose_package_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    _, said = written(tmp_path / "out", "small", ["sorted", "compiled", "onnx"])
    assert said == [
        "no form compiled: AOTInductor needs a C++ compiler, and none is on the path",
        "no form onnx: onnxruntime is not installed",
    ]
