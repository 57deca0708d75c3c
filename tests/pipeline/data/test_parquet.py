"""Round trips through parquet files made by hand, and every way in which they can be damaged."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.data.files import DamagedDataError, find_shards, fingerprint
from pipeline.data.parquet import Layout, load_parquet
from pipeline.data.write_parquet import write_parquet

LAYOUT = Layout("label", num_classes=3, size=32)
ONE = "train-00000-of-00001.parquet"


def load(folder: Path, layout: Layout = LAYOUT):
    return load_parquet(folder, ["train"], layout).images[0]


def by_hand(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("image", ["img", "image"])
def test_shards_row_groups_and_modes_come_back_in_order(
    tmp_path: Path, encode: Callable, write: Callable, image: str
) -> None:
    kinds = [("RGB", "PNG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")]
    kinds += [("LA", "PNG"), ("1", "PNG"), ("L", "JPEG"), ("RGB", "JPEG")]
    data = [encode(mode, kind, seed=seed) for seed, (mode, kind) in enumerate(kinds)]
    labels = [2, 0, 1, 1, 0, 2, 2, 0, 1]
    write(tmp_path / "train-00001-of-00002.parquet", data[4:], labels[4:], image=image, rows=2)
    write(tmp_path / "train-00000-of-00002.parquet", data[:4], labels[:4], image=image, rows=3)
    images = load(tmp_path)
    assert images.pixels_NCHW.dtype == torch.uint8
    assert images.labels_N.dtype == torch.int64
    assert images.labels_N.tolist() == labels
    for pixels, one in zip(images.pixels_NCHW.numpy(), data, strict=True):
        np.testing.assert_array_equal(pixels, by_hand(one))


def test_grey_has_three_equal_channels(tmp_path: Path, encode: Callable, write: Callable) -> None:
    write(tmp_path / ONE, [encode("L")], [0])
    red, green, blue = load(tmp_path).pixels_NCHW[0]
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    assert red.float().std() > 10


def damaged(data: bytes) -> bytes:
    """Turn one bit in the middle."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    "hurt", [damaged, lambda data: data[:-40], lambda data: b"not an image", lambda data: b""]
)
def test_a_damaged_image_is_named(
    tmp_path: Path, encode: Callable, write: Callable, hurt: Callable
) -> None:
    images = [encode(seed=seed) for seed in range(7)]
    images[5] = hurt(images[5])
    write(tmp_path / ONE, images, [0] * 7)
    with pytest.raises(DamagedDataError, match=rf"{ONE}: row 5: image cannot be decoded"):
        load(tmp_path)


def test_a_truncated_jpeg_is_named(tmp_path: Path, encode: Callable, write: Callable) -> None:
    write(tmp_path / ONE, [encode(kind="JPEG"), encode(kind="JPEG")[:-300]], [0, 0])
    with pytest.raises(DamagedDataError, match=rf"{ONE}: row 1: image cannot be decoded"):
        load(tmp_path)


def test_another_size_is_named(tmp_path: Path, encode: Callable, write: Callable) -> None:
    write(tmp_path / ONE, [encode(), encode(size=31)], [0, 0])
    with pytest.raises(DamagedDataError, match=r"row 1: image is 31 x 31, want 32 x 32"):
        load(tmp_path)


def test_sixteen_bit_grey_is_refused(tmp_path: Path, write: Callable) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(buffer, "PNG")
    write(tmp_path / ONE, [buffer.getvalue()], [0])
    with pytest.raises(DamagedDataError, match=r"row 0: image .*mode I;16 is none of"):
        load(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, write: Callable) -> None:
    bomb = io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(bomb, "PNG")
    write(tmp_path / ONE, [bomb.getvalue()], [0])
    with pytest.raises(DamagedDataError, match=r"row 0: image .*pixels"):
        load(tmp_path)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_named(
    tmp_path: Path, encode: Callable, write: Callable, label: int
) -> None:
    write(tmp_path / ONE, [encode()] * 5, [0, 1, 2, 0, label])
    with pytest.raises(
        DamagedDataError, match=rf"{ONE}: row 4: label must be in 0\.\.2, got {label}"
    ):
        load(tmp_path)


def test_missing_values_are_named(tmp_path: Path, encode: Callable, write: Callable) -> None:
    write(tmp_path / ONE, [encode()] * 3, [0, None, 1])
    with pytest.raises(DamagedDataError, match=rf"{ONE}: row 1: the label is null"):
        load(tmp_path)
    write(tmp_path / ONE, [encode(), encode(), None], [0, 1, 1])
    with pytest.raises(DamagedDataError, match=rf"{ONE}: row 2: img holds no bytes"):
        load(tmp_path)


def test_rows_count_from_the_start_of_their_file(
    tmp_path: Path, encode: Callable, write: Callable
) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [encode()] * 4, [0] * 4)
    write(tmp_path / "train-00001-of-00002.parquet", [encode()] * 600, [0] * 555 + [9] * 45, rows=7)
    with pytest.raises(DamagedDataError, match=r"train-00001-of-00002.parquet: row 555: label"):
        load(tmp_path)


def test_a_missing_folder_says_what_to_set(tmp_path: Path) -> None:
    message = r"data folder .*/nowhere does not exist; set ROBUST_MOE_DATA or dataset\.path"
    with pytest.raises(DamagedDataError, match=message):
        load(tmp_path / "nowhere")


def test_a_missing_split_lists_what_is_there(
    tmp_path: Path, encode: Callable, write: Callable
) -> None:
    with pytest.raises(DamagedDataError, match="found no parquet files"):
        load(tmp_path)
    write(tmp_path / "test-00000-of-00001.parquet", [encode()], [0])
    message = r"no train split in .*: looked for train-\*\.parquet, found test-00000-of-00001"
    with pytest.raises(DamagedDataError, match=message):
        load(tmp_path)


def test_a_missing_shard_is_noticed(tmp_path: Path, encode: Callable, write: Callable) -> None:
    write(tmp_path / "train-00000-of-00003.parquet", [encode()], [0])
    write(tmp_path / "train-00002-of-00003.parquet", [encode()], [0])
    with pytest.raises(DamagedDataError, match="shards of train are missing or mixed up"):
        load(tmp_path)


def test_shards_without_numbers_are_read_by_name(
    tmp_path: Path, encode: Callable, write: Callable
) -> None:
    for name in ("train-b.parquet", "train-a.parquet"):
        write(tmp_path / name, [encode()], [0])
    assert [file.name for file in find_shards(tmp_path, "train")] == [
        "train-a.parquet",
        "train-b.parquet",
    ]


def test_empty_files_are_refused(tmp_path: Path, write: Callable) -> None:
    write(tmp_path / ONE, [], [])
    with pytest.raises(DamagedDataError, match=rf"{ONE} is empty: 0 rows"):
        load(tmp_path)
    (tmp_path / ONE).write_bytes(b"")
    with pytest.raises(DamagedDataError, match=rf"{ONE} is empty: 0 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_a_truncated_file_is_named_in_one_line(
    tmp_path: Path, encode: Callable, write: Callable, keep: float
) -> None:
    file = write(tmp_path / ONE, [encode(seed=seed) for seed in range(9)], [0] * 9)
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(DamagedDataError, match=rf"{ONE} is not a readable parquet file") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_turned_bit_never_goes_unnoticed(tmp_path: Path, encode: Callable) -> None:
    """Turn bits all over a file: each time an error that names it, or the right images."""
    images, labels = [(encode(seed=seed), None) for seed in range(4)], {"label": [0, 1, 2, 0]}
    file = write_parquet(tmp_path, "train", images, labels, {"label": ["a", "b", "c"]})
    whole, right, messages = file.read_bytes(), load(tmp_path), []
    for position in range(5, len(whole), 211):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            found = load(tmp_path)
        except DamagedDataError as error:
            messages.append(str(error))
        else:
            assert torch.equal(found.pixels_NCHW, right.pixels_NCHW), position
            assert torch.equal(found.labels_N, right.labels_N), position
    assert len(messages) > 20
    assert all(ONE in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": ["x"], "label": [0]}, "has the columns picture, label; want img or image and"),
        ({"img": [{"bytes": b"x"}], "fine_label": [0]}, "want img or image and label"),
        ({"img": ["x"], "label": [0]}, "the bytes of img are string, want struct<bytes: binary"),
        ({"img": [{"bytes": b"x"}], "label": [0.5]}, "label is double, want an integer"),
    ],
)
def test_other_columns_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / ONE)
    with pytest.raises(DamagedDataError, match=message):
        load(tmp_path)


def test_class_names_come_from_the_file_and_must_fit(tmp_path: Path, encode: Callable) -> None:
    write_parquet(
        tmp_path, "train", [(encode(), None)], {"label": [1]}, {"label": ["cat", "dog", "emu"]}
    )
    assert load_parquet(tmp_path, ["train"], LAYOUT).class_names == ("cat", "dog", "emu")
    with pytest.raises(DamagedDataError, match=r"train-00000.*: label has 3 classes, want 10"):
        load(tmp_path, Layout("label", 10, 32))


def test_the_fingerprint_follows_the_bytes(
    tmp_path: Path, encode: Callable, write: Callable
) -> None:
    file = write(tmp_path / ONE, [encode()], [0])
    before = fingerprint([file])
    assert before == fingerprint([file])
    write(file, [encode()], [1])
    assert before != fingerprint([file])
