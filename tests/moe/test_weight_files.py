"""Weight files as people have them: read without prefixes, or refused for what they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from moe.backbones.vit import ViT
from moe.weight_files import read_weights

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 22000000\n"
WHOLE = save({"a": torch.zeros(40)})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (LFS, "a git-lfs pointer: git lfs pull"),
        (b"", "it is empty: 0 bytes"),
        (b"<!DOCTYPE html><html></html>", "a page or a text, not weights"),
        (b"PK\x03\x04 archive/data.pkl", "a PyTorch file"),
        (b"\x80\x02}q\x00.", "a PyTorch file"),
        (WHOLE[:-40], "cut short: fetch it again"),
    ],
)
def test_file_that_is_no_safetensors_file_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, why: str
) -> None:
    file = tmp_path / "vit.safetensors"
    file.write_bytes(content)
    for read in (read_weights, lambda path: ViT(weights=str(path))):
        with pytest.raises(ValueError, match=r"weights must be a safetensors file, got ") as found:
            read(file)
        assert why in str(found.value)
        assert str(file) in str(found.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
def test_prefix_that_all_names_share_is_dropped(tmp_path: Path, prefix: str) -> None:
    save_file({f"{prefix}a.b": torch.ones(2), f"{prefix}c": torch.ones(1)}, tmp_path / "w")
    assert sorted(read_weights(tmp_path / "w")) == ["a.b", "c"]


def test_prefix_of_some_names_is_kept(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(2), "c": torch.ones(1)}, tmp_path / "w")
    assert sorted(read_weights(tmp_path / "w")) == ["c", "module.a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    save_file({"a": torch.ones(2), "b": torch.tensor([1.0, value])}, tmp_path / "w")
    with pytest.raises(ValueError, match=r"b of .* holds NaN or infinite values"):
        read_weights(tmp_path / "w")
