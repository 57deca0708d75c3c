"""Run folders: path, checks of the storage, and the lock that keeps other processes out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config import Config
from pipeline.data import OnDisk
from pipeline.storage.lease import leased
from pipeline.storage.object_store import check_uri
from pipeline.storage.sync import home_of, set_home_aside, storage_root
from pipeline.tracking import resolve_uri

LONGEST_NAME = 160  # bytes: a file system takes 255 of a folder, Ray's actors and ours add to it
POLL = 0.3  # seconds between two tries for a lock


def run_folder(config: Config) -> Path:
    """Name the folder of a run: its name and its fingerprint are its identity."""
    root = storage_root(config.storage) / config.experiment
    return root / f"{config.name}-{config.fingerprint[:8]}"


def check_lasting(config: Config) -> None:
    """Refuse a storage, tracking or data path that does not outlive a Ray job.

    Raises:
        ValueError: The storage is no folder and no URI of a kind that we reach; or this is a Ray
            job, whose working directory is a temporary copy, and the run would be kept, tracked or
            look for its data below it.
    """
    if remote := "://" in config.storage:
        check_uri(config.storage)
    else:
        check_folder_name(config)
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if not (job.get("runtime_env") or {}).get("working_dir"):
        return
    want = []
    if not remote and not Path(config.storage).expanduser().is_absolute():
        want.append("storage=/shared/runs")
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri or resolve_uri(uri) != uri.rstrip("/"):
        want.append("MLFLOW_TRACKING_URI=http://server:5000 (or sqlite:////shared/mlflow.db)")
    data = config.dataset.path or os.environ.get("ROBUST_MOE_DATA", "")
    if isinstance(config.dataset, OnDisk) and not ("://" in data or Path(data).is_absolute()):
        want.append("ROBUST_MOE_DATA=/shared/data")
    if want:
        raise ValueError(
            "a Ray job's working directory is a temporary copy, so nothing can be kept in it; "
            f"give places that last: {', '.join(want)}"
        )


def check_folder_name(config: Config) -> None:
    """Refuse a storage that can be no folder, and a name that no file system takes.

    Raises:
        ValueError: As said; names the key, its value and what is valid.
    """
    root = Path(config.storage).expanduser()
    there = next(part for part in (root, *root.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"storage must be a folder, got {config.storage!r}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"storage must be a folder to write to, got {config.storage!r}")
    for key in ("name", "experiment"):
        if len(getattr(config, key).encode()) > LONGEST_NAME:
            raise ValueError(
                f"{key} must be at most {LONGEST_NAME} bytes, got {getattr(config, key)!r}"
            )


@contextmanager
def owned(folder: Path, say: Callable[[str], None], patience: float = 60.0) -> Iterator[bool]:
    """Keep other processes out of a folder; tell whether it was free within so many seconds.

    A driver that was killed may leave one that still writes its last checkpoint, hence the wait.
    The lock ends with the process, however it ends; where the folder's home is an object store,
    ``pipeline.storage.lease`` keeps other machines out, and the folder is fetched and kept there.
    """
    with locked(folder, say, patience) as free:
        home = home_of(folder)
        if not free or home is None:
            yield free
            return
        with leased(home, folder, say, patience) as ours:
            yield ours


@contextmanager
def locked(folder: Path, say: Callable[[str], None], patience: float) -> Iterator[bool]:
    """Keep other processes out of a folder, as far as its disk has locks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, free = FileLock(folder.parent / f".{folder.name}.lock"), True
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say(f"another process has {shown(folder)}: waits for it")
            lock.acquire(timeout=patience, poll_interval=POLL)
    except Timeout:
        free = False
    except OSError:  # a file system without locks
        pass
    try:
        yield free
    finally:
        lock.release()


def set_aside(folder: Path) -> Path | None:
    """Rename a folder, so that a run can start over under its name; None: there was none."""
    if not folder.exists():
        return None
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    set_home_aside(folder, aside)
    return folder.rename(aside)


def shown(path: Path) -> str:
    """Shorten a path that lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
