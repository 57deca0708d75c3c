"""ImageNet in small: its splits, its stand-ins, what it holds and what it refuses."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.data.crops import CentreCrop
from pipeline.data.files import DamagedDataError
from pipeline.data.imagenet import ImageNet
from pipeline.data.parquet import Layout
from pipeline.data.row_groups import read_index
from pipeline.data.splits import Share, Splits
from pipeline.data.streaming import Streamed
from pipeline.data.tiny_imagenet import TinyImageNet
from pipeline.data.validate import check_split
from pipeline.loop import fit

ONE = "{}-00000-of-00001.parquet"
MODES = ("RGB", "L", "CMYK")


def photograph(row: int) -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (30 + row % 9, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(MODES[row % 3]).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path, write: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with imagenette: 40 images of four classes, 12 to test on."""
    monkeypatch.setenv("ROBUST_MOE_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "imagenette"
    labels = [(0, 217, 482, 701)[row % 4] for row in range(40)]
    write(folder / ONE.format("train"), [photograph(r) for r in range(40)], labels, rows=6)
    tests = [photograph(r) for r in range(100, 112)]
    write(folder / ONE.format("validation"), tests, labels[:12], rows=5)
    return tmp_path / "data"


def small(**changes: object) -> ImageNet:
    settings = {"variant": "imagenette", "image_size": 16, "validation": 0.2}
    return ImageNet(**settings | changes)  # type: ignore[arg-type]


def rows_of(splits: Splits) -> set[int]:
    assert isinstance(splits.train, Streamed)
    return set(splits.train.rows_N.tolist())


def test_splits_are_balanced_disjoint_and_follow_the_seed(data: Path) -> None:
    splits, again, other = (small().load(seed) for seed in (0, 0, 1))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (32, 8, 12)
    assert splits.train.labels_N.bincount()[[0, 217, 482, 701]].tolist() == [8] * 4
    assert splits.validation.labels_N.bincount()[[0, 217, 482, 701]].tolist() == [2] * 4
    assert rows_of(splits) == rows_of(again) != rows_of(other)
    assert torch.equal(splits.test.pixels_NCHW, other.test.pixels_NCHW)
    assert len(splits.class_names) == 1000


def test_validation_and_test_are_centre_crops_of_rows_that_are_not_trained_on(data: Path) -> None:
    splits, view = small().load(seed=0), CentreCrop(16)
    apart = sorted(set(range(40)) - rows_of(splits))
    for found, rows in ((splits.validation, apart), (splits.test, range(100, 112))):
        for pixels, row in zip(found.pixels_NCHW.numpy(), rows, strict=True):
            picture = Image.open(io.BytesIO(photograph(row))).convert("RGB")
            np.testing.assert_array_equal(pixels, view(picture, 0))


def test_centre_crops_are_decoded_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small().load(seed=0)
    monkeypatch.setattr("pipeline.data.row_groups.decode_unit", None)
    again = small().load(seed=0)
    assert torch.equal(first.validation.pixels_NCHW, again.validation.pixels_NCHW)
    assert torch.equal(first.test.pixels_NCHW, again.test.pixels_NCHW)


def test_subsets_are_balanced(data: Path) -> None:
    splits = small(train_images=20, test_images=4).load(seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 4)
    assert splits.test.labels_N.tolist().count(217) == 1
    with pytest.raises(ValueError, match=r"train_images must be in 1\.\.40, got 41"):
        small(train_images=41).load(seed=0)


def test_a_stand_in_is_taken_with_a_warning_where_imagenet_is_not_there(data: Path) -> None:
    with pytest.warns(UserWarning, match=r"data/imagenet does not exist: .*/imagenette stands for"):
        assert len(small(variant="auto").load(seed=0).test) == 12
    (data / "imagenette").rename(data / "imagenet")
    assert len(small(variant="auto").load(seed=0).test) == 12
    with pytest.raises(DamagedDataError, match=r"imagenette does not exist; set ROBUST_MOE_DATA"):
        small().load(seed=0)


@pytest.mark.parametrize("name", ["valid", "val"])
def test_the_test_split_goes_by_three_names(data: Path, name: str) -> None:
    file = data / "imagenette" / ONE.format("validation")
    file.rename(file.with_name(ONE.format(name)))
    assert len(small().load(seed=0).test) == 12


def test_a_set_without_a_test_split_says_what_to_do(data: Path) -> None:
    with pytest.raises(ValueError, match=r"test_fraction must be 0 for .*, whose test split is va"):
        small(test_fraction=0.2).load(seed=0)
    (data / "imagenette" / ONE.format("validation")).unlink()
    with pytest.raises(DamagedDataError, match=r"has no test split .*set dataset\.test_fraction="):
        small().load(seed=0)
    one, other = (small(test_fraction=0.2).load(seed) for seed in (0, 1))
    assert (len(one.train), len(one.validation), len(one.test)) == (24, 8, 8)
    assert torch.equal(one.test.pixels_NCHW, other.test.pixels_NCHW), "always the same ones"


def test_one_image_a_class_is_enough(data: Path, write: Callable) -> None:
    """As in imagenet-sample, whose rows are sorted by class."""
    file = data / "imagenet-sample" / ONE.format("train")
    write(file, [photograph(r) for r in range(30)], list(range(30)), rows=10)
    splits = small(variant="imagenet-sample", test_fraction=0.2).load(seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (19, 5, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 15}, r"image_size must be from 16 to 1024, got 15"),
        ({"min_area": 0.0}, r"min_area must be above 0 and at most 1, got 0\.0"),
        ({"test_fraction": 0.6}, r"test_fraction must be from 0 to 0\.5, got 0\.6"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageNet(**wrong)


def test_variant_and_reader_are_words_of_a_list() -> None:
    for key in ("variant", "reader"):
        with pytest.raises(ValueError, match=rf"dataset\.{key} must be one of auto, .*got 'x'"):
            override(Config(), {"dataset": "imagenet", f"dataset.{key}": "x"})


def test_reader_is_no_part_of_the_fingerprint() -> None:
    one = override(Config(), {"dataset": "imagenet"})
    assert one.fingerprint == override(one, {"dataset.reader": "threads"}).fingerprint
    assert one.fingerprint != override(one, {"dataset.min_area": 0.2}).fingerprint


def test_tiny_imagenet_reads_train_and_valid(tmp_path: Path, encode: Callable, write: Callable):
    for split, count in (("train", 40), ("valid", 10)):
        images = [encode("L" if i % 5 == 0 else "RGB", "JPEG", 64, i) for i in range(count)]
        write(tmp_path / ONE.format(split), images, [199 - i % 4 for i in range(count)])
    splits = TinyImageNet(path=str(tmp_path), validation=0.2).load(seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (32, 8, 10)
    assert splits.test.pixels_NCHW.shape == (10, 3, 64, 64)
    red, green, _ = splits.test.pixels_NCHW[5]
    assert torch.equal(red, green)


def bomb(side: int) -> bytes:
    """A PNG of ``side`` x ``side`` black pixels, made without holding them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    squeeze, row = zlib.compressobj(1), bytes(1 + -(-side // 8))
    pixels = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_a_bomb_is_refused_with_file_and_row_before_it_is_decoded(
    tmp_path: Path, write: Callable
) -> None:
    data = bomb(50_000)
    assert len(data) < 4_000_000, "2.5 gigapixels in a small file"
    file = write(tmp_path / ONE.format("train"), [photograph(0), data, photograph(1)], [0, 1, 2])
    index = read_index([file], Layout("label", 1000))
    stream = Streamed(index, np.arange(3), Layout("label", 1000), 16, 0.2, "threads")
    message = r"train-00000.*: row 1: image .*pixels"
    with pytest.raises(DamagedDataError, match=message):
        list(stream.batches(Share(seed=0, epoch=0, first=0, batch_size=3)))
    with pytest.raises(DamagedDataError, match=message):
        check_split(tmp_path, "train", Layout("label", 1000))


class StopError(Exception):
    """Stands for whatever ends a process."""


def test_a_run_on_a_stream_that_is_interrupted_ends_as_if_it_had_not_been(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import checkpoint, end_of_run
    from pipeline.context import Session

    monkeypatch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
    monkeypatch.setattr(end_of_run, "draw", lambda *_: None)
    changes = {"dataset": "imagenet", "dataset.variant": "imagenette", "dataset.image_size": 16}
    changes |= {"dataset.validation": 0.2, "algorithm": "standard", "backbone.ratio": 0.125}
    changes |= {"evaluation.steps": 1, "evaluation.validation_steps": 1, "epochs": 2}
    config = override(Config(), changes | {"batch_size": 8, "checkpoint_steps": 1, "lr": 0.02})

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        found, _ = checkpoint.newest(folder / "checkpoints")
        assert found is not None
        return checkpoint.load_model(found).state_dict()

    fit(config, tmp_path / "straight")
    updates = 0

    def emit(event: object) -> None:
        nonlocal updates
        updates += event["kind"] == "progress"  # type: ignore[index]
        if updates == 7:  # in the second epoch of four updates
            raise StopError

    with pytest.raises(StopError):
        fit(config, tmp_path / "stopped", Session(emit=emit))
    fit(config, tmp_path / "stopped")
    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


REAL = os.environ.get("ROBUST_MOE_DATA") or str(Path(__file__).parents[3] / "data")


@pytest.mark.slow
@pytest.mark.skipif(not Path(REAL, "imagenette").is_dir(), reason="no real imagenette at hand")
def test_two_ray_workers_stream_imagenette_and_train_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image once in both epochs, on real photographs; memory does not grow."""
    from tests.helpers.stream_speed import SETTINGS
    from tests.helpers.stream_speed import run as measure

    monkeypatch.setenv("ROBUST_MOE_DATA", REAL)
    out = measure(override(Config(), SETTINGS))  # checks that every image came once
    assert [len(seen) for seen in out["seen"]] == [450, 450]
    assert out["memory"][-1] < out["memory"][-2] + 200
