"""Where data lie: a folder on a disk, or one behind a URI such as ``s3://bucket/prefix``.

A split is the files ``<split>-*.parquet`` of a folder.

A URI is opened by pyarrow (``s3``, ``gs``, ``file``), with the credentials that the environment
holds: ``AWS_*`` and ``AWS_ENDPOINT_URL``, or Google's application default. Errors name the URI
without what may be secret in it.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.data.decode import one_line

TESTS = ("validation", "valid", "val")  # names that exports give to the split we test on
WHOLE = 1 << 30  # bytes of a data set up to which its fingerprint reads all of them


class DamagedDataError(ValueError):
    """The files do not hold what they should, or cannot be read; names file and row."""


@dataclass(frozen=True)
class Remote:
    """A folder or file behind a URI, with the methods of ``Path`` that reading data needs."""

    uri: str

    def __str__(self) -> str:
        parts = urlsplit(self.uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    def __truediv__(self, name: str) -> "Remote":
        parts = urlsplit(self.uri)
        return Remote(parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl())

    @property
    def name(self) -> str:
        """Last part of the path."""
        return str(self).rpartition("/")[2]

    def is_dir(self) -> bool:
        """Whether there is such a folder; in an object store, any object below it."""
        return bool(self._info(self._path).type == fs.FileType.Directory)

    def glob(self, pattern: str) -> "list[Remote]":
        """List the files in this folder whose names fit."""
        return self._files(pattern, recursive=False)

    def rglob(self, pattern: str) -> "list[Remote]":
        """List the files below this folder whose names fit."""
        return self._files(pattern, recursive=True)

    def size(self) -> int:
        """Bytes of this file."""
        return int(self._info(self._path).size or 0)

    def open(self) -> Any:
        """Open this file for reading at any place."""
        with reaching(self):
            return filesystem(self.uri)[0].open_input_file(self._path)

    @property
    def _path(self) -> str:
        with reaching(self):
            root = filesystem(self.uri)[1].rstrip("/")
        return (root + unquote(urlsplit(self.uri).path)).rstrip("/") or "/"

    def _info(self, path: str) -> Any:
        with reaching(self):
            return filesystem(self.uri)[0].get_file_info(path)

    def _files(self, pattern: str, *, recursive: bool) -> "list[Remote]":
        base = self._path
        selector = fs.FileSelector(base, allow_not_found=True, recursive=recursive)
        names = (
            found.path[len(base) :].lstrip("/")
            for found in self._info(selector)
            if found.is_file and fnmatch(found.base_name, pattern)
        )
        return [self / name for name in names]


Place = Path | Remote


def place(text: str) -> Place:
    """Read a folder's name: a path, or a URI if it has ``://`` in it."""
    return Remote(text) if "://" in text else Path(text).expanduser()


@cache
def _filesystem(scheme: str, netloc: str, query: str) -> tuple[Any, str]:
    """Reach a store once, since asking for a bucket's region takes a round trip."""
    uri = f"{scheme}://{netloc}/" + (f"?{query}" if query else "")
    found: tuple[Any, str] = fs.FileSystem.from_uri(uri)
    return found


def filesystem(uri: str) -> tuple[Any, str]:
    """Return pyarrow's file system of a URI, and the path there that its host or bucket has."""
    parts = urlsplit(uri)
    return _filesystem(parts.scheme, parts.netloc, parts.query)


@contextmanager
def reaching(where: Remote) -> Iterator[None]:
    """Turn what Arrow says of a store into one line that names the URI."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DamagedDataError(f"{where} cannot be read: {one_line(error)}") from error


def size_of(file: Place) -> int:
    """Bytes of a file."""
    return file.size() if isinstance(file, Remote) else file.stat().st_size


def open_file(file: Place) -> Any:
    """Open a file for reading bytes, at any place."""
    return file.open() if isinstance(file, Remote) else file.open("rb")


# Splits ------------------------------------------------------------------------------------------


def find_shards(folder: Place, split: str) -> list[Place]:
    """List the files of a split by name.

    Raises:
        DamagedDataError: There is no such folder, no such split, or a shard is missing.
    """
    check_folder(folder)
    pattern = f"{split}-*.parquet"
    files: list[Place] = sorted(folder.glob(pattern), key=str)
    if not files:
        there = sorted(str(file).removeprefix(f"{folder}/") for file in folder.rglob("*.parquet"))
        raise DamagedDataError(
            f"no {split} split in {folder}: looked for {pattern}, found "
            + (", ".join(there[:8]) or "no parquet files")
        )
    shards = [re.search(r"-(\d{5})-of-(\d{5})", file.name) for file in files]
    numbers = [(int(shard[1]), int(shard[2])) for shard in shards if shard]
    if numbers and numbers != [(i, len(files)) for i in range(len(files))]:
        listed = ", ".join(file.name for file in files[:8])
        raise DamagedDataError(f"{folder}: shards of {split} are missing or mixed up: {listed}")
    return files


def find_test(folder: Place) -> str:
    """Name the split of a folder to test on; empty if there is none."""
    there = find_splits(folder)
    return next((name for name in TESTS if name in there), "")


def check_folder(folder: Place) -> None:
    """Refuse a data folder that is not there."""
    if not folder.is_dir():
        raise DamagedDataError(
            f"data folder {folder} does not exist; set ROBUST_MOE_DATA or dataset.path, or see "
            "python -m pipeline.data_tool --help for how to fetch or import data"
        )


def find_splits(folder: Place) -> list[str]:
    """List the splits that a folder holds, train first."""
    names = {file.name.split("-")[0] for file in folder.glob("*-*.parquet")}
    return sorted(names, key=lambda name: (name != "train", name))


def fingerprint(files: Sequence[Place]) -> str:
    """Hash what files hold, in the order of their names.

    Up to 1 GiB that is every byte of them. Of more (ImageNet has 140 GiB) it is each file's name,
    size and parquet footer, where the places, sizes and statistics of all row groups stand: other
    rows or shards change it, damage within a page of pixels does not. That is found when the row
    is read, by its page's check sum or its decoder.
    """
    sha256 = hashlib.sha256()
    large = sum(size_of(file) for file in files) > WHOLE
    for file in sorted(files, key=lambda file: file.name):
        if large:
            sha256.update(f"{file.name} {size_of(file)} ".encode() + footer(file))
            continue
        with open_file(file) as opened:
            while block := opened.read(1 << 20):
                sha256.update(block)
    return sha256.hexdigest()


def footer(file: Place) -> bytes:
    """Read the metadata at the end of a parquet file: ``<footer> <its length, 4 bytes> PAR1``."""
    with open_file(file) as opened:
        opened.seek(max(0, size_of(file) - 8))
        tail = opened.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length + 12 > size_of(file):
            raise DamagedDataError(f"{file} is not a readable parquet file: it has no footer")
        opened.seek(size_of(file) - 8 - length)
        found: bytes = opened.read(length)
    return found
