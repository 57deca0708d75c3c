"""Run folders in an object store: worked in on a node's disk, and kept whole behind a URI.

``storage=s3://bucket/prefix`` makes a run folder a scratch folder of this node, and its *home* the
prefix ``<storage>/<experiment>/<run>``. A home has two parts with one writer each: ``training``
(checkpoints, plots, card: rank 0) and ``tracking`` (journal, ``run.json``, results: the driver).

A part is objects named by the sha256 of what they hold, and ``list.json``: which file is which
object. The list is put last and in one request, so it names a whole state, the one before or the
new one; whatever a killed writer left beside it is nothing. Credentials and endpoint come from the
environment, as for data (``pipeline.data.files``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from filelock import FileLock

from pipeline.data.files import Remote
from pipeline.storage.object_store import Bucket, StoreError, TakenError

DRIVER = ("run.json", "journal.jsonl", "journal.jsonl.ack", "result.json", "cells.json", "model")
NEITHER = ("ray", "logs")  # Ray's own, and the lines of a grid's cells
TRIES = 3  # to read a file that is being appended to
PAUSES = (1.0, 4.0, 15.0, 40.0)  # seconds between tries to put a checkpoint
BUSY = threading.Lock()  # while this process changes a home


def storage_root(storage: str) -> Path:
    """Name the folder on this node below which experiments are: of a URI, a scratch folder.

    That is ``$ROBUST_MOE_SCRATCH``, or one of this user's own among the temporary files.
    """
    if "://" not in storage:
        return Path(storage).expanduser().resolve()
    chosen = os.environ.get("ROBUST_MOE_SCRATCH")
    default = Path(tempfile.gettempdir()) / f"robust-moe-runs-{os.getuid()}"
    return Path(chosen or default).expanduser().resolve() / quote(storage.rstrip("/"), safe="")


def home_of(folder: Path) -> Remote | None:
    """Name the home of a run folder; None: it is a plain folder, and its own home."""
    for part in folder.parts:
        if "%3A%2F%2F" in part:
            below = folder.parts[folder.parts.index(part) + 1 :]
            return Remote("/".join([unquote(part), *(quote(name, safe="") for name in below)]))
    return None


def restore(folder: Path, part: str) -> None:
    """Make one part of a run folder what its home holds; a plain folder is left alone."""
    if (home := home_of(folder)) is not None:
        Part(home, folder, part).pull(keep_newer=part == "tracking")


def set_home_aside(folder: Path, aside: Path) -> None:
    """Move what a home holds to another folder's home, object by object."""
    old, new = home_of(folder), home_of(aside)
    if old is None or new is None:
        return
    with BUSY:
        for found in Bucket(old).files():
            if found != "owner.json" and not found.startswith("ray/"):
                Bucket(old).move(found, new / found)


def digest(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Parts -------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One part of a home, and the files of a run folder that it holds.

    Attributes:
        owner: Token of whoever may write; empty: nobody asks.
    """

    home: Remote
    folder: Path
    name: str  # "training" or "tracking"
    owner: str = ""
    _hashes: dict[str, tuple[tuple[int, int], str]] = field(default_factory=dict, init=False)

    def push(self) -> bool:
        """Make the home hold what the folder does; tell whether it did not before.

        Raises:
            StoreError: The store refuses.
            TakenError: The run belongs to another process.
        """
        with BUSY:
            bucket = Bucket(self.home / self.name)
            old, new = self.listed(), dict[str, str]()
            for path in self.files():
                name = path.relative_to(self.folder).as_posix()
                new[name] = self._hash(path)
                if new[name] not in old.values():
                    new[name] = self._upload(bucket, path, new[name])
            if new == old:
                return False
            self._check_owner()
            text = json.dumps(new, indent=1, sort_keys=True).encode()
            self._mark(bucket.write("list.json", text))
            for stale in set(old.values()) - set(new.values()):
                bucket.delete(f"objects/{stale}")
            return True

    def pull(self, *, keep_newer: bool = False) -> None:
        """Make the folder hold what the home does, and nothing else of this part.

        What is damaged there arrives damaged: a checkpoint's own hashes then refuse it by name.

        Args:
            keep_newer: Leave the folder alone if it was the last to be pushed: then what it holds
                beyond that is this node's own, from a driver that was killed.
        """
        bucket = Bucket(self.home / self.name)
        text = bucket.read("list.json") or b"{}"
        if keep_newer and self._marked() == hashlib.sha256(text).hexdigest():
            return
        known = listed(text, self.home)
        for name, sha256 in known.items():
            path = self.folder / name
            if not (path.is_file() and self._hash(path) == sha256):
                self._fetch(bucket, path, sha256)
        for path in self.files():
            if path.relative_to(self.folder).as_posix() not in known:
                path.unlink()
                with_parents(path.parent, self.folder)
        self._mark(hashlib.sha256(text).hexdigest())

    def listed(self) -> dict[str, str]:
        """Read which file is which object."""
        return listed(Bucket(self.home / self.name).read("list.json") or b"{}", self.home)

    def files(self) -> list[Path]:
        """List the files of the folder that this part holds; no drafts."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            parts = path.relative_to(self.folder).parts
            if any(part.startswith(".") for part in parts) or path.name.endswith(".new"):
                continue
            owner = "tracking" if parts[0] in DRIVER else "training"
            if parts[0] not in NEITHER and owner == self.name and path.is_file():
                found.append(path)
        return found

    def _upload(self, bucket: Bucket, path: Path, sha256: str) -> str:
        """Upload a file under its hash, however often it changes meanwhile."""
        for _ in range(TRIES):
            if (found := bucket.write(f"objects/{sha256}", path)) == sha256:
                return sha256
            bucket.delete(f"objects/{sha256}")
            sha256 = found
        text = path.read_bytes()
        return bucket.write(f"objects/{hashlib.sha256(text).hexdigest()}", text)

    def _fetch(self, bucket: Bucket, path: Path, sha256: str) -> None:
        path.unlink(missing_ok=True)
        if (text := bucket.read(f"objects/{sha256}")) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_bytes(text)
        draft.replace(path)

    def _hash(self, path: Path) -> str:
        """Hash a file, once for each of its states."""
        stat = path.stat()
        state, name = (stat.st_mtime_ns, stat.st_size), path.as_posix()
        if name not in self._hashes or self._hashes[name][0] != state:
            self._hashes[name] = state, digest(path)
        return self._hashes[name][1]

    def _mark(self, sha256: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f".{self.name}.list").write_text(sha256)

    def _marked(self) -> str:
        try:
            return (self.folder / f".{self.name}.list").read_text()
        except FileNotFoundError:
            return ""

    def _check_owner(self) -> None:
        if self.owner and (found := owner_of(self.home).get("token", "")) != self.owner:
            raise TakenError(f"another process has taken over {self.home} ({found[:8] or 'none'})")


def listed(text: bytes, home: Remote) -> dict[str, str]:
    """Read a list; refuse one that is damaged, or whose names leave the folder."""
    try:
        found = json.loads(text)
        good = isinstance(found, dict) and all(map(is_entry, found.items()))
    except ValueError:
        good = False
    if not good:
        raise StoreError(f"{home}: a list.json is damaged")
    return dict(found)


def is_entry(entry: tuple[str, Any]) -> bool:
    """Tell whether a name stays below its folder, and its value is a sha256."""
    name, sha256 = entry
    inside = not any(part in ("", ".", "..") or "\\" in part for part in name.split("/"))
    return inside and isinstance(sha256, str) and len(sha256) == 64 and sha256.isalnum()


def with_parents(folder: Path, root: Path) -> None:
    """Delete folders that have become empty, up to a root."""
    while folder != root and folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        folder = folder.parent


def owner_of(home: Remote) -> Mapping[str, Any]:
    """Read who may write to a home; empty: nobody does, and what cannot be read is somebody."""
    if (text := Bucket(home).read("owner.json")) is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"token": "", "text": str(text[:200])}


def for_worker(folder: Path) -> Callable[[], None] | None:
    """Fetch a run's checkpoints to this worker's node; return what pushes new ones, or None.

    Workers of one node fetch one after the other. The pushing stops if the run's owner, at the
    time of this call, has lost it to another.
    """
    if (home := home_of(folder)) is None:
        return None
    part = Part(home, folder, "training", owner=str(owner_of(home).get("token", "")))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".fetching"):
        part.pull()
    return lambda: patiently(part)


def patiently(part: Part) -> None:
    """Push; a store that is away for a minute costs that minute, and not the run.

    Raises:
        StoreError: It is away for longer.
        TakenError: The run belongs to another process.
    """
    for pause in PAUSES:
        try:
            part.push()
            return
        except TakenError:
            raise
        except StoreError:
            time.sleep(pause)
    part.push()
