"""Files that unpack to far more than they are end with a line, before a reader opens them."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import parquet
from pipeline.data.files import DamagedDataError
from pipeline.data.parquet import Layout, load_parquet
from pipeline.data.parquet_bomb_guard import SMALL, check_column, check_pages, read_struct

ONE = "train-00000-of-00001.parquet"
LAYOUT = Layout("label", num_classes=3, size=32)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be read but footers and headers."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a reader was opened")

    monkeypatch.setattr(parquet.pq, "ParquetFile", read)


def pictures(count: int) -> pa.Array:
    draw = np.random.default_rng(0)
    data = [draw.integers(0, 256, 500, dtype=np.uint8).tobytes() for _ in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": each, "path": None} for each in data], kind)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_ordinary_files_pass(tmp_path: Path, codec: str, dictionary: bool, version: str) -> None:
    table = pa.table({"img": pictures(300), "label": pa.array([0, 1, 2] * 100)})
    pq.write_table(
        table,
        tmp_path / ONE,
        compression=codec,
        use_dictionary=dictionary,
        data_page_version=version,
        data_page_size=4096,
        row_group_size=128,
        write_page_checksum=True,
    )
    check_pages(tmp_path / ONE)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("codec", ["gzip", "zstd", "brotli"])
def test_column_that_unpacks_to_thousands_of_times_its_size_is_refused(
    tmp_path: Path, codec: str
) -> None:
    bomb = pa.array([bytes(SMALL // 4)] * 5)
    table = pa.table({"image": bomb, "label": pa.array([0] * 5)})
    pq.write_table(table, tmp_path / ONE, compression=codec, use_dictionary=False)
    assert (tmp_path / ONE).stat().st_size < SMALL / 500
    with pytest.raises(DamagedDataError, match=r"image: unpacks from \d+ to \d+ bytes") as caught:
        load_parquet(tmp_path, ["train"], LAYOUT)
    assert ONE in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 1, "nothing is kept of it"


def test_page_that_promises_more_than_the_footer_is_refused(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([bytes(1 << 20)])})
    pq.write_table(table, tmp_path / ONE, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(tmp_path / ONE).row_group(0).column(0)
    names = ("dictionary_page_offset", "data_page_offset", "total_compressed_size")
    true = {name: getattr(column, name) for name in (*names, "compression", "physical_type")}
    with (tmp_path / ONE).open("rb") as opened:
        honest = SimpleNamespace(**true, total_uncompressed_size=column.total_uncompressed_size)
        check_column(opened, honest)
        lying = SimpleNamespace(**true, total_uncompressed_size=1000)
        with pytest.raises(ValueError, match=r"to 10485\d\d bytes, the footer says 1000"):
            check_column(opened, lying)


@pytest.mark.usefixtures("unread")
def test_dictionary_that_is_repeated_to_gigabytes_is_refused(tmp_path: Path) -> None:
    """Its footer promises kilobytes: only the indices say how often a value comes."""
    rows = 5000
    indices = pa.array(np.zeros(rows, np.int32))
    image = pa.DictionaryArray.from_arrays(indices, pa.array([bytes(1 << 20)]))
    labels = np.random.default_rng(0).integers(0, 2**40, rows)  # more bytes than rows
    table = pa.table({"image": image, "label": pa.array(labels)})
    pq.write_table(table, tmp_path / ONE, compression="zstd", store_schema=False)
    column = pq.read_metadata(tmp_path / ONE).row_group(0).column(0)
    assert column.total_uncompressed_size < 2 << 20, "the footer says nothing of it"
    with pytest.raises(DamagedDataError, match="of 1048576 bytes is repeated to 5242880000"):
        load_parquet(tmp_path, ["train"], LAYOUT)


@pytest.mark.usefixtures("unread")
def test_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    table = pa.table({"image": pa.nulls(300_000, pa.binary()), "label": np.zeros(300_000, int)})
    pq.write_table(table, tmp_path / ONE)
    with pytest.raises(DamagedDataError, match=r"has 300000 rows in \d+ bytes"):
        load_parquet(tmp_path, ["train"], LAYOUT)


def test_damaged_headers_end_with_a_line_that_names_the_file(
    tmp_path: Path, encode: Callable[..., bytes], write: Callable[..., Path]
) -> None:
    """Whatever a header's bytes are: a line or a pass, never another error and never a hang."""
    write(tmp_path / ONE, [encode(seed=seed) for seed in range(3)], [0, 1, 2])
    whole = (tmp_path / ONE).read_bytes()
    column = pq.read_metadata(tmp_path / ONE).row_group(0).column(0)
    place = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    draw, refused = np.random.default_rng(0), list[bool]()
    for trial in range(60):
        spoiled = bytearray(whole)
        spoiled[place + trial % 20] = int(draw.integers(0, 256))
        file = tmp_path / f"{trial}.parquet"
        file.write_bytes(spoiled)
        try:
            check_pages(file)
        except DamagedDataError as error:
            refused.append(str(file) in str(error))
    assert len(refused) > 10
    assert all(refused)


def test_integers_of_the_compact_protocol() -> None:
    """By hand: field 1 = 300, field 2 = -1, field 20 = a struct whose field 1 is true."""
    text = bytes([0x15, 0xD8, 0x04, 0x15, 0x01, 0x0C, 0x28, 0x11, 0x00, 0x00])
    assert read_struct(text, 0) == ({1: 300, 2: -1, 20: {1: True}}, len(text))
    for end in range(len(text)):
        with pytest.raises(IndexError):
            read_struct(text[:end], 0)


def test_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    file = tmp_path / ONE
    good = pa.table({"image": pictures(3), "label": pa.array([0, 1, 2])})
    pq.write_table(good, file)
    check_pages(file)
    buffer: Any = io.BytesIO()
    rows = {"image": pa.nulls(300_000, pa.binary()), "label": np.zeros(300_000, int)}
    pq.write_table(pa.table(rows), buffer)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(DamagedDataError, match="rows in"):
        check_pages(file)
