"""Writing Hugging Face parquet: what ``datasets`` would export, one file for each split."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

GROUP = 1000  # rows of a row group at most,
GROUP_BYTES = 16 << 20  # and bytes, but for the last image: a group is read and held as a whole
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(
    folder: Path,
    split: str,
    images: Iterable[tuple[bytes, str | None]],
    labels: Mapping[str, Sequence[int]],
    names: Mapping[str, Sequence[str]],
    *,
    image_column: str = "image",
) -> Path:
    """Write one split whole or not at all, and replace an earlier file of the same name.

    Args:
        folder: Where to write; made if it is not there.
        split: First part of the file's name.
        images: Image files as they are, each with its name or None; read once, in order.
        labels: For each label column the label of every image.
        names: For each label column the names of the classes.
        image_column: Name of the image column.

    Returns:
        The file written.

    Raises:
        ValueError: Columns differ in length, or the folder holds this split in other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}-00000-of-00001.parquet"
    if others := [path.name for path in folder.glob(f"{split}-*.parquet") if path != file]:
        raise ValueError(f"{folder} already holds {', '.join(sorted(others)[:4])}: remove it first")
    part = file.with_name(f".{file.name}.{os.getpid()}")
    schema = make_schema(image_column, labels, names)
    try:
        with pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
            rows = 0
            for group in grouped(images):
                column = [{"bytes": data, "path": path} for data, path in group]
                table = {image_column: pa.array(column, PICTURE)}
                for name, every in labels.items():
                    table[name] = pa.array(every[rows : rows + len(group)], pa.int64())
                writer.write_table(pa.table(table, schema))
                rows += len(group)
        if wrong := {name: len(every) for name, every in labels.items() if len(every) != rows}:
            raise ValueError(f"{rows} images of {split} have labels {wrong}: want as many")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def grouped(images: Iterable[tuple[bytes, str | None]]) -> Iterator[list[tuple[bytes, str | None]]]:
    """Cut a stream into lists of at most ``GROUP`` images and about ``GROUP_BYTES``."""
    group, size = list[tuple[bytes, str | None]](), 0
    for image in images:
        group.append(image)
        size += len(image[0])
        if len(group) == GROUP or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def make_schema(
    image_column: str, labels: Mapping[str, Sequence[int]], names: Mapping[str, Sequence[str]]
) -> pa.Schema:
    """Describe the columns to Arrow, and in its metadata to ``datasets``."""
    features: dict[str, object] = {image_column: {"_type": "Image"}}
    for name in labels:
        features[name] = {"names": list(names[name]), "_type": "ClassLabel"}
    fields = [(image_column, PICTURE), *((name, pa.int64()) for name in labels)]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


def to_png(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """Encode an image without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()
