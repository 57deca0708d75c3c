"""Weight files as people have them: checked for being safetensors, and read without prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PREFIXES = ("module.", "_orig_mod.", "model.", "state_dict.")
"""What DataParallel, ``torch.compile`` and trainers put before every name."""


def check_weights(path: str | Path) -> None:
    """Refuse a file that is no whole safetensors file, and say what it is.

    Raises:
        ValueError: As said; names the file, and what helps.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"weights must be a safetensors file, got {str(path)!r}: no such file")
    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        why = kind_of_file(file) or f"{error}"
        raise ValueError(f"weights must be a safetensors file, got {str(path)!r} ({why})") from None


def kind_of_file(file: Path) -> str:
    """Say what a file that is no safetensors file is, and what helps; empty: unknown."""
    with file.open("rb") as opened:
        head = opened.read(64)
    if not head:
        return "it is empty: 0 bytes"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: git lfs pull fetches the file itself"
    if head.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return "a PyTorch file: load it with weights_only=True and save_file it as safetensors"
    if head.lstrip()[:1] in (b"<", b"{"):
        return "a page or a text, not weights: was it downloaded without a token?"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 30:
        return "cut short: fetch it again"
    return ""


def shared_prefix(names: Iterable[str]) -> str:
    """Return the known prefix that all names have; empty: there is none."""
    every = list(names)
    known = (p for p in PREFIXES if every and all(name.startswith(p) for name in every))
    return next(known, "")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors, without a prefix that all names share.

    Raises:
        ValueError: The file is no safetensors file, or a tensor is not finite; names both.
    """
    from safetensors.torch import load_file

    check_weights(path)
    weights: dict[str, Tensor] = load_file(str(path))
    while prefix := shared_prefix(weights):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} of {str(path)!r} holds NaN or infinite values")
    return weights
