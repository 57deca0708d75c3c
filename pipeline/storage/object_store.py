"""Objects below a URI: read, written, listed and moved whole, through pyarrow's file systems."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.data.decode import one_line
from pipeline.data.files import Remote, filesystem

SCHEMES = ("s3", "gs", "file")
BLOCK = 1 << 20
DRAFT = ".draft"


class StoreError(ValueError):
    """An object store cannot be used."""


class TakenError(StoreError):
    """Another process owns the run."""


def check_uri(storage: str) -> None:
    """Refuse a URI that cannot be a storage.

    Raises:
        ValueError: Its scheme is none of ours, or it holds a user, password or query.
    """
    parts = urlsplit(storage)
    if parts.scheme not in SCHEMES or not (parts.netloc or parts.scheme == "file"):
        raise ValueError(
            f"storage must be a folder that all workers see, or a URI such as s3://bucket/prefix "
            f"({', '.join(SCHEMES)}), got {str(Remote(storage))!r}"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"storage must be a URI without user and query, got one at {str(Remote(storage))!r}; "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL say how to reach it"
        )


@dataclass(frozen=True)
class Bucket:
    """What is below a URI, read and written whole; errors name the URI.

    Raises:
        StoreError: The store cannot be reached, or refuses.
    """

    root: Remote

    def read(self, name: str) -> bytes | None:
        """Read an object; None: there is none."""
        try:
            with self._fs.open_input_stream(self._path(name)) as stream:
                found: bytes = stream.read()
                return found
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            raise self._error("read", name, error) from error

    def write(self, name: str, source: bytes | Path) -> str:
        """Write an object, seen by others whole or not at all; return the sha256 of it."""
        sha256 = hashlib.sha256()
        path, local = self._path(name), isinstance(self._fs, fs.LocalFileSystem)
        target = f"{path}.{uuid.uuid4().hex}{DRAFT}" if local else path  # stores show whole objects
        try:
            if local:
                self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(target) as stream:
                for block in blocks(source):
                    sha256.update(block)
                    stream.write(block)
            if local:
                self._fs.move(target, path)
        except (pa.ArrowException, OSError) as error:
            raise self._error("written", name, error) from error
        return sha256.hexdigest()

    def files(self, below: str = "") -> list[str]:
        """List the names of all objects."""
        base = self._path(below).rstrip("/")
        try:
            found = self._fs.get_file_info(
                fs.FileSelector(base, allow_not_found=True, recursive=True)
            )
        except (pa.ArrowException, OSError) as error:
            raise self._error("listed", below, error) from error
        root = self._path("").rstrip("/")
        return sorted(info.path[len(root) :].lstrip("/") for info in found if whole(info))

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        try:
            self._fs.delete_file(self._path(name))
        except FileNotFoundError:
            pass
        except (pa.ArrowException, OSError) as error:
            raise self._error("deleted", name, error) from error

    def move(self, name: str, target: Remote) -> None:
        """Give an object another place in the same store."""
        there = Bucket(target)._path("")
        try:
            if isinstance(self._fs, fs.LocalFileSystem):
                self._fs.create_dir(there.rpartition("/")[0], recursive=True)
            self._fs.move(self._path(name), there)
        except (pa.ArrowException, OSError) as error:
            raise self._error("moved", name, error) from error

    @property
    def _fs(self) -> Any:
        return filesystem(self.root.uri)[0]

    def _path(self, name: str) -> str:
        root = filesystem(self.root.uri)[1].rstrip("/")
        path = (root + unquote(urlsplit(self.root.uri).path)).rstrip("/")
        return f"{path}/{name}" if name else path

    def _error(self, done: str, name: str, error: Exception) -> StoreError:
        where = self.root / name if name else self.root
        return StoreError(f"{where} cannot be {done}: {one_line(error)}")


def whole(info: Any) -> bool:
    """Tell whether a listed thing is an object, and no draft of one."""
    return bool(info.is_file) and not info.path.endswith(DRAFT)


def blocks(source: bytes | Path) -> Iterator[bytes]:
    """Read a source piece by piece."""
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while block := file.read(BLOCK):
            yield block
