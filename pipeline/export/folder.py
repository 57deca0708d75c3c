"""Exported folder: weights, config, programs, loader and model card."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moe.exported_model
from moe.export import exportable_parts, exportable_with_route
from moe.exported_model import ExportedModel
from moe.network import Network
from pipeline.checkpoint import sha256
from pipeline.config import Config
from pipeline.config.overrides import flatten, name_of
from pipeline.export.agreement import Agreement

FORMS = ("sorted", "gathered", "compiled", "onnx")
DEFAULT_FORMS = ("sorted", "gathered")
METRICS = {
    "sa": "Accuracy",
    "ra_pgd": "Accuracy under PGD",
    "ra_forced": "Accuracy under PGD along forced routes",
}


def write_programs(
    folder: Path,
    config: Config,
    model: Network,
    forms: Sequence[str],
    *,
    labels: Sequence[str],
    stage: int,
    say: Callable[[str], None],
) -> None:
    """Write weights, programs, ``load.py`` and ``config.json``; say which form is left out and why.

    Raises:
        ValueError: No form could be written.
    """
    from safetensors.torch import save_file

    size = config.dataset.image_size
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    example_BCHW = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    written: dict[str, Any] = {}
    for form in forms:
        try:
            tree, files = WRITERS[form](folder, model, example_BCHW)
        except Exception as error:  # an exporter's refusal, of whatever type
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"no form {form}: {reason}")
            continue
        written[form] = {"tree": tree, "files": files}
    loadable = {form: found for form, found in written.items() if form != "onnx"}
    if not loadable:
        raise ValueError(f"none of {', '.join(forms)} could be written")
    shutil.copyfile(moe.exported_model.__file__, folder / "load.py")
    kinds = (".pt2", ".onnx", ".safetensors")
    hashed = [file.name for file in folder.iterdir() if file.suffix in kinds]
    facts = {
        "image_size": size,
        "num_classes": config.dataset.num_classes,
        "labels": list(labels),
        "preprocessor": {"layout": "BCHW", "dtype": "float32", "range": [0.0, 1.0], "mode": "RGB"},
        "forms": loadable,
        "onnx": written.get("onnx"),
        "sha256": {name: sha256(folder / name) for name in sorted(hashed)},
        "settings": flatten(config),
        "stage": stage,
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


Written = tuple[dict[str, Any], dict[str, str]]


def write_sorted(folder: Path, model: Network, example_BCHW: torch.Tensor) -> Written:
    """Write a program for each router and each expert."""
    parts, tree = exportable_parts(model)
    for name, part in parts.items():
        save_program(trace(part, example_BCHW), folder / f"{name}.pt2")
    return tree, {name: f"{name}.pt2" for name in parts}


def write_gathered(folder: Path, model: Network, example_BCHW: torch.Tensor) -> Written:
    """Write one program of the whole model."""
    save_program(trace(exportable_with_route(model), example_BCHW), folder / "gathered.pt2")
    return {"kind": "whole"}, {"model": "gathered.pt2"}


def write_compiled(folder: Path, model: Network, example_BCHW: torch.Tensor) -> Written:
    """Compile the sorted form's programs for this machine, without gradients."""
    from torch._inductor import aoti_compile_and_package

    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("AOTInductor needs a C++ compiler, and none is on the path")
    parts, tree = exportable_parts(model)
    for name, part in parts.items():
        with torch.no_grad():
            program = trace(part, example_BCHW)
        aoti_compile_and_package(program, package_path=str(folder / f"{name}.aoti.pt2"))
    return tree, {name: f"{name}.aoti.pt2" for name in parts}


def write_onnx(folder: Path, model: Network, example_BCHW: torch.Tensor) -> Written:
    """Write the sorted form's programs as ONNX, each checked with onnxruntime.

    Raises:
        ValueError: A package is missing, or onnxruntime gives other outputs.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed") from None
    parts, tree = exportable_parts(model)
    for name, part in parts.items():
        file, dim = folder / f"{name}.onnx", torch.export.Dim.DYNAMIC
        torch.onnx.export(
            part,
            (example_BCHW,),
            file,
            dynamo=True,
            dynamic_shapes=[{0: dim}],
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for x_BCHW in (example_BCHW, example_BCHW[:1]):
            feed = {session.get_inputs()[0].name: x_BCHW.numpy()}
            found = torch.from_numpy(session.run(None, feed)[0])
            with torch.no_grad():
                wanted = part(x_BCHW)
            if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
                raise ValueError(f"onnxruntime gives other outputs for {name}")
    return tree, {name: f"{name}.onnx" for name in parts}


WRITERS: Mapping[str, Callable[[Path, Network, torch.Tensor], Written]] = {
    "sorted": write_sorted,
    "gathered": write_gathered,
    "compiled": write_compiled,
    "onnx": write_onnx,
}


def trace(module: nn.Module, example_BCHW: torch.Tensor) -> torch.export.ExportedProgram:
    """Trace a module for any batch size."""
    auto = torch.export.Dim.AUTO
    return torch.export.export(module, (example_BCHW,), dynamic_shapes=[{0: auto}])


def save_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Save a traced program."""
    with warnings.catch_warnings():  # torch's archive writer warns of shared storage
        warnings.simplefilter("ignore", UserWarning)
        torch.export.save(program, file)


def load_forms(folder: Path) -> list[ExportedModel]:
    """Load each form of an exported folder."""
    first = ExportedModel(folder)
    return [first, *(ExportedModel(folder, f) for f in first.config["forms"] if f != first.form)]


def write_card(folder: Path, config: Config, agreement: Agreement) -> None:
    """Write ``README.md``, a model card with Hugging Face's YAML header."""
    dataset, threat = name_of("dataset", config.dataset), config.evaluation
    under = f"{threat.norm}, eps {threat.eps:.6g}, first {agreement.images} test images"
    header: list[str] = [
        "---",
        "library_name: pytorch",
        "pipeline_tag: image-classification",
        "tags: [adversarial-robustness, mixture-of-experts]",
        "model-index:",
        f"- name: {json.dumps(config.name)}",
        "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{name: {json.dumps(dataset)}, type: {json.dumps(dataset)}, split: test}}",
        "    metrics:",
    ]
    for name, value in agreement.exported.items():
        title = METRICS[name] if name == "sa" else f"{METRICS[name]} ({under})"
        header.append(f"    - {{type: accuracy, name: {json.dumps(title)}, value: {value:.6f}}}")
    rows = [
        f"| {METRICS[name]} | {agreement.network[name]:.4f} | {value:.4f} |"
        for name, value in agreement.exported.items()
    ]
    text = [
        *header,
        "---",
        f"# {config.name}",
        "",
        f"Backbone `{name_of('backbone', config.backbone)}`, trained on `{dataset}` by "
        f"`{name_of('algorithm', config.algorithm)}`. Images are RGB, {config.dataset.image_size} "
        "pixels a side, float32 in [0, 1]; the model normalizes them itself.",
        "",
        "```python",
        "from load import ExportedModel",
        "",
        'model = ExportedModel(".")',
        "logits, route = model(images)  # (B, 3, H, W)",
        "```",
        "",
        f"Attacked after the export ({under}):",
        "",
        "| | network | exported model |",
        "|---|---|---|",
        *rows,
        "",
        f"Logits differ by at most {agreement.gap:.1e} of the largest. These are a check of the "
        "export on few images; a statement on robustness needs stronger attacks on the whole test "
        "set.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")
