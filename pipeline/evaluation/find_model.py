"""The model that a command names: a checkpoint folder, or the best one of a run in MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config.overrides import flatten
from pipeline.data import Dataset
from pipeline.evaluation.outcome_cache import digest
from pipeline.tracking import EVALUATED, download, resolve_run


@dataclass(frozen=True)
class TransferSource:
    """Another run's model, on which attacked images are made.

    Attributes:
        model: Frozen.
        run: Its id in MLflow, or its folder.
        origin: Hash of its weights and of the settings that make them a network.
        class_names: Of the data that it was trained on; empty: not kept.
    """

    model: Network
    run: str
    origin: str
    class_names: tuple[str, ...] = ()


def find(name: str, where: Config, scratch: Path) -> tuple[Path, dict[str, str]]:
    """Return the checkpoint folder that a name stands for, and the tags that say what it is."""
    if Path(name).exists():
        return Path(name), {EVALUATED: str(Path(name).resolve())}
    run = resolve_run(where.tracking_uri, name, where.experiment)
    folder = download(where.tracking_uri, run, "checkpoints/best", scratch, where.experiment)
    return folder, {EVALUATED: run, "mlflow.parentRunId": run}


def read_source(name: str, where: Config, scratch: Path, dataset: Dataset) -> TransferSource:
    """Load the model on which attacked images are made.

    Raises:
        ValueError: There is no such run, or its model takes other images or tells other classes.
    """
    folder, of = find(name, where, scratch)
    model, own = checkpoint.load_model(folder), checkpoint.load_config(folder)
    for key in ("num_classes", "image_size"):
        here, there = getattr(dataset, key), getattr(own.dataset, key)
        if here != there:
            raise ValueError(f"transfer must be a run with {key} {here}, got {name!r} with {there}")
    names = tuple(checkpoint.data_of(folder).get("class_names", ()))
    return TransferSource(fold(model), of[EVALUATED], origin(own, folder), names)


def origin(config: Config, folder: Path) -> str:
    """Hash a checkpoint's weights and the settings that make them a network."""
    weights = checkpoint.sha256(folder / "model.safetensors")
    return digest(weights, json.dumps(flatten(config.backbone), sort_keys=True))
