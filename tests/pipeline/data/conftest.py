"""Image and parquet files made by hand, and a cache folder for each test."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUST_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Make an image file, its pixels drawn from ``seed``."""

    def encode(mode: str = "RGB", kind: str = "PNG", size: int = 32, seed: int = 0) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, kind)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write rows to parquet with pyarrow alone."""

    def write(
        file: Path,
        images: Sequence[bytes | None],
        labels: Sequence[int | None],
        *,
        image: str = "img",
        label: str = "label",
        rows: int = 3,
    ) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": data, "path": None} for data in images], kind)
        table = pa.table({image: column, label: pa.array(labels, pa.int64())})
        pq.write_table(table, file, row_group_size=rows)
        return file

    return write
