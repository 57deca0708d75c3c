"""Hugging Face parquet: any number of shards and row groups, and no row that is silently wrong.

A split is the files ``<split>-*.parquet`` of a folder. An image column is ``img`` or ``image``, a
struct with the whole image file in ``bytes``; labels are integers. Every error names file and row;
rows count from 0 in each file.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipeline.data import cache
from pipeline.data.class_names import check_same_classes
from pipeline.data.decode import one_line, open_picture, to_rgb
from pipeline.data.files import (
    DamagedDataError,
    Place,
    Remote,
    find_shards,
    fingerprint,
    size_of,
)
from pipeline.data.parquet_bomb_guard import check_pages, check_sums
from pipeline.data.splits import Images

IMAGE_COLUMNS = ("img", "image")
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
"""How Arrow calls a column of bytes: by its length, longer than 2 GiB, or as views (polars)."""
ROWS = 512  # read at a time
AHEAD = 64  # decoded at a time


@dataclass(frozen=True)
class Layout:
    """What the rows of a dataset must hold.

    Attributes:
        label: Column of the labels.
        num_classes: Labels are 0..num_classes-1; None: any from 0 on.
        size: Pixels per side; None: any.
    """

    label: str
    num_classes: int | None = None
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """Decoded splits, the hash of their files, and the names of the classes."""

    images: tuple[Images, ...]
    sha256: str
    class_names: tuple[str, ...]


def load_parquet(folder: Place, splits: Sequence[str], layout: Layout) -> Stored:
    """Decode splits of a layout with fixed ``num_classes`` and ``size``, or map them if cached.

    Raises:
        DamagedDataError: The folder, a split or a row is not as it should be.
    """
    if layout.num_classes is None or layout.size is None:
        raise ValueError(f"num_classes and size must be given to load images, got {layout}")
    found = {split: find_shards(folder, split) for split in splits}
    every = [file for files in found.values() for file in files]
    names = names_of_classes(every, layout.label, layout.num_classes)
    sha256 = fingerprint(every)
    images = tuple(load_split(files, layout, f"{sha256} {split}") for split, files in found.items())
    return Stored(images, sha256, names)


def load_split(files: list[Place], layout: Layout, content: str) -> Images:
    """Decode the files of one split, or map them if cached; ``content`` tells what is in them."""
    assert layout.size is not None
    shape = (sum(count_rows(file) for file in files), 3, layout.size, layout.size)
    key = hashlib.sha256(repr((cache.VERSION, content, layout)).encode()).hexdigest()

    def fill(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        end = 0
        for file in files:
            for rows in read_rows(file, layout):
                start, end = end, end + len(rows.labels)
                labels[start:end] = rows.labels
                for i, picture in enumerate(decode_rows(rows, layout)):
                    pixels[start + i] = picture.pixels
        assert end == len(labels)

    pixels, labels = cache.cached(key, shape, fill)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


# Files -------------------------------------------------------------------------------------------


@contextmanager
def open_parquet(file: Place) -> Iterator[Any]:
    """Open a file, and turn what Arrow says of damage into one line that names it."""
    try:
        if not size_of(file):
            raise DamagedDataError(f"{file} is empty: 0 bytes")
        source = file.open() if isinstance(file, Remote) else file
        if not isinstance(file, Remote):  # a store would be asked once a page
            check_pages(file)
        with pq.ParquetFile(source, page_checksum_verification=True) as opened:
            check_sums(file, opened.metadata, size_of(file))
            if not opened.metadata.num_rows:
                raise DamagedDataError(f"{file} is empty: 0 rows")
            yield opened
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise DamagedDataError(
            f"{file} is not a readable parquet file: {one_line(error)}"
        ) from error


def count_rows(file: Place) -> int:
    """Read the number of rows from a file's footer."""
    with open_parquet(file) as opened:
        return int(opened.metadata.num_rows)


def class_names(file: Place, label: str) -> tuple[str, ...]:
    """Read the names of a label's classes from what ``datasets`` wrote; empty if there are none."""
    with open_parquet(file) as opened:
        metadata = (opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(metadata)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def names_of_classes(files: Sequence[Place], label: str, num_classes: int) -> tuple[str, ...]:
    """Read the classes' names, the same in all files; numbers where no file names any.

    Raises:
        DamagedDataError: A file has another number of classes.
        ClassNamesError: Two files give a label to different classes.
    """
    named = [(file, names) for file in files if (names := class_names(file, label))]
    for file, names in named:
        if len(names) != num_classes:
            raise DamagedDataError(f"{file}: {label} has {len(names)} classes, want {num_classes}")
        check_same_classes(str(named[0][0]), named[0][1], str(file), names)
    return named[0][1] if named else tuple(str(number) for number in range(num_classes))


# Rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a file, still encoded; ``first`` is the position of the first of them."""

    file: Place
    first: int
    data: list[bytes]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded image (3, H, W), and the mode it was stored in."""

    pixels: NDArray[np.uint8]
    mode: str


def read_rows(file: Place, layout: Layout) -> Iterator[Rows]:
    """Stream through a file without holding more than some of its rows.

    Raises:
        DamagedDataError: A column or a value is missing, or not as it should be.
    """
    with open_parquet(file) as opened:
        image = check_columns(file, opened.schema_arrow, layout.label)
        first, promised = 0, opened.metadata.num_rows
        for batch in opened.iter_batches(ROWS, columns=[image, layout.label]):
            labels = check_labels(file, first, batch.column(layout.label), layout.num_classes)
            data = bytes_of(file, first, batch, image)
            if first + len(data) <= promised:
                yield Rows(file, first, data, labels)
            first += len(data)
        if first != promised:
            raise DamagedDataError(f"{file}: has {first} rows, but its footer says {promised}")


def bytes_of(file: Place, first: int, batch: Any, image: str) -> list[bytes]:
    """Return the encoded images of a batch or table whose first row is ``first`` in its file."""
    pictures = batch.column(image)
    if pa.types.is_struct(pictures.type):
        names = [field.name for field in pictures.type]
        pictures = pictures.flatten()[names.index("bytes")]
    data: list[Any] = pictures.to_pylist()
    if None in data:
        row = first + data.index(None)
        raise DamagedDataError(f"{file}: row {row}: {image} holds no bytes")
    return data


def check_columns(file: Place, schema: Any, label: str) -> str:
    """Return the name of the image column, after a look at the types of both columns."""
    images = [name for name in IMAGE_COLUMNS if name in schema.names]
    if not images or label not in schema.names:
        wanted = f"{' or '.join(IMAGE_COLUMNS)} and {label}"
        raise DamagedDataError(f"{file}: has the columns {', '.join(schema.names)}; want {wanted}")
    kind = schema.field(images[0]).type
    if pa.types.is_struct(kind) and "bytes" in (names := [field.name for field in kind]):
        kind = kind.field(names.index("bytes")).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_kind(kind) for is_kind in BYTES):
        raise DamagedDataError(
            f"{file}: the bytes of {images[0]} are {kind}, want struct<bytes: binary, path> or "
            "binary"
        )
    if not pa.types.is_integer(kind := schema.field(label).type):
        raise DamagedDataError(f"{file}: {label} is {kind}, want an integer")
    return images[0]


def check_labels(
    file: Place, first: int, column: Any, num_classes: int | None
) -> NDArray[np.int64]:
    """Return labels (N,), each of them there and in range."""
    if column.null_count:
        row = first + column.is_null().to_pylist().index(True)
        raise DamagedDataError(f"{file}: row {row}: the label is null")
    labels: NDArray[np.int64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    wrong = labels < 0
    if num_classes is not None:
        wrong |= labels >= num_classes
    if wrong.any():
        i = int(wrong.argmax())
        valid = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
        raise DamagedDataError(f"{file}: row {first + i}: label must be {valid}, got {labels[i]}")
    return labels


def decode_rows(rows: Rows, layout: Layout) -> Iterator[DecodedImage]:
    """Decode rows on all cores, in order.

    Raises:
        DamagedDataError: An image is damaged or not of the right size.
    """

    def decode(i: int) -> DecodedImage:
        try:
            picture = open_picture(rows.data[i])
            if layout.size is not None and picture.size != (layout.size, layout.size):
                width, height = picture.size
                raise ValueError(f"is {width} x {height}, want {layout.size} x {layout.size}")
            return DecodedImage(to_rgb(picture), picture.mode)
        except ValueError as error:
            raise DamagedDataError(f"{rows.file}: row {rows.first + i}: image {error}") from error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows.data), AHEAD):
            yield from pool.map(decode, range(start, min(start + AHEAD, len(rows.data))))
