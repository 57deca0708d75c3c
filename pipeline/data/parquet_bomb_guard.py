"""What a parquet file would unpack to, read from its page headers before anything is unpacked.

A reader makes room for whatever a page's header promises, and repeats a dictionary's values as
often as the indices say, so a file of kilobytes may ask for terabytes. The footer's sums say
nothing of the second and may lie about the first. Headers are Thrift's compact protocol
(apache/parquet-format, ``parquet.thrift``, ``PageHeader``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.files import DamagedDataError

SMALL = 64 << 20  # bytes that any column of a row group may unpack to
RATIO = 32  # and beyond them, how many times its size in the file: pixels are not packed so well
PAGE = 256 << 20  # bytes of one page
REPEATED = 2 << 30  # bytes that a row group's dictionary may be repeated to
HEADER = 1 << 14  # bytes read at first for a header; statistics may make it longer
DICTIONARY, DICTIONARY_CODED = 2, (2, 8)  # page type; encodings PLAIN_DICTIONARY, RLE_DICTIONARY


def check_pages(file: Path) -> None:
    """Refuse a local file that unpacks to far more than it is, once for each of its states.

    Raises:
        DamagedDataError: A column, page, dictionary or number of rows is out of proportion.
    """
    stat = file.stat()
    _check(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _check(file: Path, size: int, _: int) -> None:
    metadata = pq.read_metadata(file)
    check_sums(file, metadata, size)
    with file.open("rb") as opened:
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                try:
                    check_column(opened, column)
                except (IndexError, KeyError, ValueError, OSError, pa.ArrowException) as error:
                    where = f"row group {group}, column {column.path_in_schema}"
                    raise DamagedDataError(f"{file}: {where}: {reason(error)}") from error


def check_sums(file: object, metadata: Any, size: int) -> None:
    """Refuse what the footer itself admits, of a file of ``size`` bytes.

    Raises:
        DamagedDataError: There are more rows than bytes, or a column is out of proportion.
    """
    if metadata.num_rows > size:
        raise DamagedDataError(f"{file}: has {metadata.num_rows} rows in {size} bytes")
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
            if unpacked > max(SMALL, RATIO * min(packed, size)):
                raise DamagedDataError(
                    f"{file}: row group {group}, column {column.path_in_schema}: unpacks from "
                    f"{packed} to {unpacked} bytes"
                )


def check_column(opened: Any, column: Any) -> None:
    """Walk through the pages of a column of a row group.

    Raises:
        ValueError: They promise more than the footer says, or than may be.
    """
    starts = (column.dictionary_page_offset, column.data_page_offset)
    place = min(start for start in starts if start)
    end, total, longest, repeated = place + column.total_compressed_size, 0, 0, 0
    while place < end:
        header, length = read_header(opened, place)
        unpacked, packed = header[2], header[3]
        place += length
        if packed < 0 or unpacked < 0 or place + packed > end or unpacked > PAGE:
            raise ValueError(f"a page unpacks from {packed} to {unpacked} bytes")
        total += unpacked
        if header[1] == DICTIONARY and column.physical_type == "BYTE_ARRAY":
            opened.seek(place)
            longest = longest_value(opened.read(packed), column.compression, unpacked)
        data = header.get(5) or header.get(8) or {}
        if data.get(4 if 8 in header else 2) in DICTIONARY_CODED:
            repeated += data[1] * longest
        place += packed
    if total > column.total_uncompressed_size:
        raise ValueError(
            f"pages unpack to {total} bytes, the footer says {column.total_uncompressed_size}"
        )
    if repeated > REPEATED:
        raise ValueError(f"a dictionary of values of {longest} bytes is repeated to {repeated}")


def longest_value(page: bytes, codec: str, size: int) -> int:
    """Find the longest of a dictionary's values, each behind its length in 4 bytes."""
    if codec == "UNCOMPRESSED":
        plain = page
    else:
        name = {"LZ4": "lz4_raw", "LZ4_RAW": "lz4_raw"}.get(codec, codec.lower())
        plain = pa.decompress(page, decompressed_size=size, codec=name, asbytes=True)
    place = longest = 0
    while place < len(plain):
        length = int.from_bytes(plain[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return longest


def read_header(opened: Any, place: int) -> tuple[dict[int, Any], int]:
    """Read the page header that begins at a place; return its fields and its length."""
    size = HEADER
    while True:
        opened.seek(place)
        text = opened.read(size)
        try:
            return read_struct(text, 0)
        except IndexError:
            if len(text) < size or size > 64 * HEADER:
                raise ValueError("a page header does not end") from None
            size *= 8


def read_struct(text: bytes, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Read a struct of the compact protocol: its fields by number, and where it ends."""
    if depth > 8:
        raise ValueError("a page header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while (byte := text[place]) != 0:
        place += 1
        if byte >> 4:
            number += byte >> 4
        else:
            number, place = read_integer(text, place)
        fields[number], place = read_value(text, place, byte & 15, depth)
    return fields, place + 1


def read_value(text: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    """Read a value of one of the kinds that page headers use."""
    if kind in (1, 2):  # true, false
        return kind == 1, place
    if kind == 3:
        return text[place], place + 1
    if kind in (4, 5, 6):  # integers
        return read_integer(text, place)
    if kind == 7:  # double
        return None, place + 8
    if kind == 8:  # bytes
        length, place = read_varint(text, place)
        return None, place + length
    if kind == 12:
        return read_struct(text, place, depth + 1)
    raise ValueError(f"a page header holds a value of kind {kind}")


def read_integer(text: bytes, place: int) -> tuple[int, int]:
    """Read a signed integer: the sign is in the lowest bit."""
    value, place = read_varint(text, place)
    return (value >> 1) ^ -(value & 1), place


def read_varint(text: bytes, place: int) -> tuple[int, int]:
    """Read an integer of 7 bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = text[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 70:
            raise ValueError("a page header holds an integer that does not end")


def reason(error: Exception) -> str:
    """Say what was wrong with a header."""
    plain = isinstance(error, ValueError) and not isinstance(error, pa.ArrowException)
    return str(error) if plain else "a page header is damaged"
