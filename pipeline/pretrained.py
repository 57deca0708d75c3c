"""Start from weights that somebody else trained: a file named in the config."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from moe.backbones.vit import TransformerBody
from moe.network import Network
from pipeline.checkpoint import sha256
from pipeline.config import Config, flatten


def start(config: Config, model: Network) -> None:
    """Load the files that the backbone names, if any, into the transformers that they are for.

    Experts that start from the same file differ in their classifiers alone, where these are new.

    Raises:
        ValueError: A file is missing, is not the one that the config was made with, or does not
            fit; names the key.
    """
    from safetensors.torch import load_file

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
        weights = load_file(path)
        target: nn.Module = model  # or a half of it; what is said of an expert is for all
        for part in key.split(".")[1:-1]:
            target = target if part == "expert" else target.get_submodule(part)
        for body in target.modules():
            if isinstance(body, TransformerBody):
                try:
                    body.take_timm(weights)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
