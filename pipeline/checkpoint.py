"""Checkpoints that are whole or absent: a folder with a hash of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.backbones import Backbone
from moe.backbones.vit import TransformerBody
from moe.network import Network
from moe.token_network import TokenNetwork
from moe.upcycling import relative_change, upcycle
from moe.weight_files import read_weights
from pipeline.algorithms.staged import Staged
from pipeline.config import Config, read
from pipeline.config.overrides import flatten
from pipeline.data.class_names import check_same_classes

FILES = ("model.safetensors", "state.pt", "config.json")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or cannot be written."""


def build_model(config: Config, stage: int = -1) -> Network:
    """Make the network of a run, in channels-last layout, from torch's global generator.

    Args:
        stage: Of an algorithm that changes its network; -1 is the last, the one to deploy.
    """
    classes, size = config.dataset.num_classes, config.dataset.image_size
    if isinstance(config.algorithm, Staged):
        stage %= len(config.algorithm.stages())
        net = config.algorithm.build(stage, config.backbone, classes, size)
    else:
        net = config.backbone.build(classes, size)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def save(
    folder: Path, config: Config, model: Network, state: dict[str, Any], meta: dict[str, Any]
) -> None:
    """Write a checkpoint under a temporary name, then rename it.

    Args:
        folder: Where it shall stand; replaced if it is there.
        state: What resuming needs beside the weights; plain values and tensors.
        meta: JSON values that describe it, such as epoch, step and metrics.

    Raises:
        CheckpointError: There is no room for it, or no right to write it.
    """
    from safetensors.torch import save_file

    with drafted(folder) as draft:
        draft.mkdir(parents=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, draft / "model.safetensors")
        torch.save(state, draft / "state.pt")
        (draft / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
        hashes = {name: sha256(draft / name) for name in FILES}
        (draft / "meta.json").write_text(describe(meta, hashes))
        for file in draft.iterdir():
            _flush(file)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Give a folder the name it shall have once the block has filled it; else leave no trace.

    Raises:
        CheckpointError: It could not be filled.
    """
    from safetensors import SafetensorError

    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
        publish(draft, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer knows no OSError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be written: {reason}{room(folder)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def room(folder: Path) -> str:
    """Say how much room a folder's disk has left."""
    try:
        free = shutil.disk_usage(folder.parent).free
    except OSError:
        return ""
    return f" ({free / 2**20:.1f} MiB free there)"


def describe(meta: dict[str, Any], hashes: dict[str, str]) -> str:
    """Write ``meta.json``: the values and a hash of each file, of these values too."""
    own = hashlib.sha256(json.dumps([meta, hashes], sort_keys=True).encode()).hexdigest()
    return json.dumps(meta | {"sha256": hashes | {"meta.json": own}}, indent=2) + "\n"


def publish(draft: Path, folder: Path) -> None:
    """Rename a finished folder to its name, over an older one if need be."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def copy(source: Path, folder: Path) -> None:
    """Copy a checkpoint, whole or not at all."""
    with drafted(folder) as draft:
        shutil.copytree(source, draft)


def verify(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's ``meta`` if every file is what was written.

    Raises:
        CheckpointError: A file is missing or differs from its hash; names the file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint folder")
    try:
        text = (folder / "meta.json").read_text()
        meta: dict[str, Any] = json.loads(text)
        hashes = {name: str(meta["sha256"][name]) for name in FILES}
        if text != describe({k: v for k, v in meta.items() if k != "sha256"}, hashes):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: meta.json is missing or damaged"
        ) from None
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if (found := sha256(folder / name)) != expected:
            raise CheckpointError(
                f"{folder} is damaged: {name} has sha256 {found[:12]}, want {expected[:12]}"
            )
    return meta


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole ``step_*`` checkpoint; say what was passed over."""
    passed = []
    for folder in sorted(root.glob("step_*"), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            passed.append(str(error))
            continue
        return folder, passed
    return None, passed


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` of the ``step_*`` checkpoints, and abandoned drafts."""
    for folder in [*sorted(root.glob("step_*"))[:-keep], *root.glob(".*.*")]:
        shutil.rmtree(folder, ignore_errors=True)


def load_config(folder: str | Path) -> Config:
    """Read the config of a checkpoint.

    Raises:
        CheckpointError: ``config.json`` is missing, or is not what was written.
        ValueError: A setting is none that this version knows.
    """
    file = Path(folder) / "config.json"
    try:
        flat = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from None
    if not isinstance(flat, dict):
        raise CheckpointError(f"{file} is damaged: it holds a {type(flat).__name__}")
    return read(flat)


def load_weights(folder: Path, model: Network) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: The file holds something else.
    """
    from safetensors.torch import load_file

    with refusing(folder, "model.safetensors"):
        model.load_state_dict(load_file(folder / "model.safetensors"))


def load_state(folder: Path) -> dict[str, Any]:
    """Read what resuming needs beside the weights; never runs code that the file carries.

    Raises:
        CheckpointError: The file holds more than tensors and plain values, or something else.
    """
    with refusing(folder, "state.pt"):
        state: dict[str, Any] = torch.load(
            folder / "state.pt", weights_only=True, map_location="cpu"
        )
    return state


@contextmanager
def refusing(folder: Path, name: str) -> Iterator[None]:
    """Turn what torch and safetensors say of a file whose hash is right into one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: {name} is refused: {text}") from error


def data_of(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint keeps of its data, ``sha256`` and ``class_names``; old ones: nothing.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
    """
    found: dict[str, Any] = verify(folder).get("data", {})
    return found


def class_names_of(folder: Path) -> list[str]:
    """Name the classes of a checkpoint's data; an old one's by their numbers.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
    """
    numbers = map(str, range(load_config(folder).dataset.num_classes))
    return list(data_of(folder).get("class_names") or numbers)


def check_classes(folder: Path, where: str, names: Sequence[str]) -> None:
    """Refuse data whose labels are other classes than those that a checkpoint was trained on.

    Raises:
        ClassNamesError: The names or their order differ.
    """
    check_same_classes(f"checkpoint {folder}", data_of(folder).get("class_names", ()), where, names)


def load_model(folder: str | Path) -> Network:
    """Build a checkpoint's model with its weights, in eval mode, ready for evaluation.

    Raises:
        CheckpointError: The checkpoint is missing or damaged; names the file.
    """
    meta = verify(Path(folder))
    model = build_model(load_config(folder), meta.get("stage", -1))
    load_weights(Path(folder), model)
    return model.eval()


def sha256(path: Path) -> str:
    """Hash a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start(config: Config, model: Network) -> float | None:
    """Load what the config names to start from, if anything: files, or a dense run to upcycle.

    Experts that start from the same file differ in their classifiers alone, where these are new.

    Returns:
        Where a dense network became a mixture: the relative change of its logits.

    Raises:
        ValueError: A file is missing, is not the one that the config was made with, or does not
            fit; names the key.
    """
    load_files(config, model)
    size = config.dataset.image_size
    if config.upcycle:
        return relative_change(_upcycle(config, model), model, size)
    if isinstance(model, TokenNetwork) and vars(config.backbone).get("weights"):
        one: Backbone = replace(config.backbone, num_experts=1)  # type: ignore[type-var]
        dense = one.build(config.dataset.num_classes, size)
        load_files(config, dense)
        dense.body.head.load_state_dict(model.body.head.state_dict())  # type: ignore[union-attr]
        return relative_change(dense, model, size)
    return None


def _upcycle(config: Config, model: Network) -> Network:
    folder = Path(config.upcycle)
    try:
        dense = load_model(folder)
        if sha256(folder / "model.safetensors") != config.upcycle_sha256:
            raise ValueError("its weights are not those that upcycle_sha256 names")
        upcycle(dense, model, config.dataset.image_size)
    except ValueError as error:
        raise ValueError(f"upcycle={config.upcycle}: {error}") from None
    return dense


def load_files(config: Config, model: Network) -> None:
    """Load the files that the backbone names, if any, into the transformers that they are for."""
    flat = flatten(config)
    for key, path in flat.items():
        if not (key.startswith("backbone.") and key.endswith(".weights") and path):
            continue
        if not Path(path).is_file():
            raise ValueError(f"{key} must be a safetensors file that every worker sees, got {path}")
        if (found := sha256(Path(path))) != (want := flat[f"{key}_sha256"]):
            raise ValueError(
                f"{key} has sha256 {found[:12]}, but {key}_sha256 is {want[:12]}: another file; "
                f"{key}_sha256= (empty) takes it as it is"
            )
        try:
            weights = read_weights(path)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        target: nn.Module = model  # or a half of it; what is said of an expert is for all
        for part in key.split(".")[1:-1]:
            target = target if part == "expert" else target.get_submodule(part)
        for body in target.modules():
            if isinstance(body, TransformerBody):
                try:
                    body.take_timm(weights)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
