"""Rows of parquet files at random: where each one is, and its picture as a view of it.

Parquet is read by whole row groups, so rows are read in units: some rows of one row group.
Shapes: N rows of a split, G row groups.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Fill
from pipeline.data.crops import View
from pipeline.data.decode import as_rgb, open_picture
from pipeline.data.files import DamagedDataError, Place
from pipeline.data.parquet import Layout, bytes_of, check_columns, check_labels, open_parquet

UNIT = 256  # the most rows of a unit: what one task decodes and holds


@dataclass(frozen=True, eq=False)
class Unit:
    """Rows to read from one row group.

    Attributes:
        file, group: Which row group.
        first: How many rows of the file come before the group.
        offset: How many rows of the split come before the group.
        rows: Positions in the group, in the order wanted.
    """

    file: Place
    group: int
    first: int
    offset: int
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def pick(self, which: NDArray[np.int64]) -> "Unit":
        """Keep some of the rows, in this order."""
        return Unit(self.file, self.group, self.first, self.offset, self.rows[which])


@dataclass(frozen=True, eq=False)
class Index:
    """Every row of a split: its label, and the row group that holds it.

    Attributes:
        labels_N: Of the rows, through the files by name.
        groups: ``(file, number of the group in it, rows of the file before it, of the split)``.
        start_G: Rows of the split before each group, and at last all of them (G + 1).
    """

    labels_N: NDArray[np.int64]
    groups: list[tuple[Place, int, int, int]]
    start_G: NDArray[np.int64]

    def units(self, rows: NDArray[np.int64]) -> list[Unit]:
        """Cut ascending rows of the split into units of at most ``UNIT``."""
        found = []
        cuts = np.searchsorted(rows, self.start_G)
        for group, low, high in zip(self.groups, cuts, cuts[1:], strict=False):
            for start in range(low, high, UNIT):
                piece = rows[start : min(start + UNIT, high)]
                found.append(Unit(*group, piece - group[3]))
        return found


def read_index(files: Sequence[Place], layout: Layout) -> Index:
    """Read the labels and the sizes of the row groups of all files, several files at a time.

    Raises:
        DamagedDataError: A file, its columns or a label is not as it should be.
    """

    def read(file: Place) -> tuple[NDArray[np.int64], list[int]]:
        with open_parquet(file) as opened:
            check_columns(file, opened.schema_arrow, layout.label)
            column = opened.read(columns=[layout.label]).column(layout.label)
            labels = check_labels(file, 0, column, layout.num_classes)
            metadata = opened.metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        if len(labels) != sum(sizes):
            raise DamagedDataError(f"{file}: has {len(labels)} labels, but {sum(sizes)} rows")
        return labels, sizes

    with ThreadPoolExecutor(16) as pool:  # more than cores: reading a store is waiting for it
        parts = list(pool.map(read, files))
    groups, total = [], 0
    for file, (_, sizes) in zip(files, parts, strict=True):
        first = 0
        for number, size in enumerate(sizes):
            groups.append((file, number, first, total))
            first, total = first + size, total + size
    start_G = np.array([*(group[3] for group in groups), total], dtype=np.int64)
    return Index(np.concatenate([labels for labels, _ in parts]), groups, start_G)


def decode_unit(unit: Unit, layout: Layout, view: View) -> NDArray[np.uint8]:
    """Read and decode the rows of a unit to (len(unit), 3, size, size).

    Raises:
        DamagedDataError: The row group or an image is damaged; names file and row.
    """
    with open_parquet(unit.file) as opened:
        image = check_columns(unit.file, opened.schema_arrow, layout.label)
        table = opened.read_row_group(unit.group, columns=[image], use_threads=False)
        if len(table) <= unit.rows.max():
            raise DamagedDataError(f"{unit.file}: row group {unit.group} has {len(table)} rows")
        data = bytes_of(unit.file, unit.first, table.combine_chunks(), image)
    pixels = np.empty((len(unit), 3, view.size, view.size), np.uint8)
    for i, row in enumerate(unit.rows.tolist()):
        try:
            picture = as_rgb(open_picture(data[row]))
        except ValueError as error:
            raise DamagedDataError(f"{unit.file}: row {unit.first + row}: image {error}") from error
        pixels[i] = view(picture, unit.offset + row)
    return pixels


def in_threads(
    units: Sequence[Unit],
    decode: Callable[[Unit], NDArray[np.uint8]],
    *,
    ahead: int,
    threads: int,
) -> Iterator[NDArray[np.uint8]]:
    """Decode units in order on threads; about ``ahead`` rows are in work or wait to be taken."""
    pool, waiting = ThreadPoolExecutor(threads), deque[tuple[Future[NDArray[np.uint8]], int]]()
    rest, rows = iter(units), 0
    try:
        while True:
            while rows < ahead and (unit := next(rest, None)) is not None:
                waiting.append((pool.submit(decode, unit), len(unit)))
                rows += len(unit)
            if not waiting:
                return
            future, taken = waiting.popleft()
            yield future.result()
            rows -= taken
    finally:
        pool.shutdown(cancel_futures=True)


def fill_centre(index: Index, rows: NDArray[np.int64], layout: Layout, view: View) -> Fill:
    """Give what decodes ascending rows of a split into arrays, on all cores."""

    def fill(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        end = 0
        units = index.units(rows)
        decode = partial(decode_unit, layout=layout, view=view)
        for piece in in_threads(units, decode, ahead=4 * UNIT, threads=cores()):
            start, end = end, end + len(piece)
            pixels[start:end] = piece
        labels[:] = index.labels_N[rows]

    return fill


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
