"""Decoded images on the node's disk: made once, then mapped by every worker.

The pages of a mapped file are shared, so that eight workers hold one copy in memory. The folder is
``$ROBUST_MOE_CACHE``, or one of this user's own among the temporary files; it may be deleted at
any time. Arrays are made in their file, so that a set larger than memory can be (ImageNet's 50,000
test images at 224 px are 7.5 GB). A cache that cannot be used costs time, never the run.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

VERSION = 1  # raise it when the same files would be decoded to other arrays
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
Fill = Callable[[NDArray[np.uint8], NDArray[np.int64]], None]


def cache_folder() -> Path:
    """Name the folder that holds decoded images."""
    chosen = os.environ.get("ROBUST_MOE_CACHE")
    return Path(chosen or Path(tempfile.gettempdir()) / f"robust-moe-{os.getuid()}").expanduser()


def cached(key: str, shape: tuple[int, ...], fill: Fill) -> Arrays:
    """Map the arrays stored under ``key``, or make and store them first.

    Of several processes that ask at once, one makes and the others wait.

    Args:
        key: A hash of all that decides the arrays.
        shape: Shape (N, C, H, W) of the pixels; a file that does not fit it is made again.
        fill: Writes pixels (N, C, H, W) and labels (N,) into the arrays it is given.
    """
    folder = cache_folder()
    try:
        with only_one(folder, key):
            if (found := find(folder, key, shape)) is not None:
                return found
            with (
                new(folder / f"{key}.pixels.npy", shape, np.uint8) as pixels,
                new(folder / f"{key}.labels.npy", shape[:1], np.int64) as labels,
            ):
                fill(pixels, labels)
            if (found := find(folder, key, shape)) is not None:
                return found
            raise OSError("what was written cannot be read again")
    except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
        warnings.warn(f"decoded images are not kept in {folder}: {error}", stacklevel=2)
    arrays = np.empty(shape, np.uint8), np.empty(shape[:1], np.int64)
    fill(*arrays)
    return arrays


@contextmanager
def only_one(folder: Path, key: str) -> Iterator[None]:
    """Hold a lock that ends with the process, if nothing else ends it.

    Raises:
        OSError: The folder cannot be written, or belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError("the folder belongs to another user")
    with FileLock(folder / f"{key}.lock"):
        yield


def find(folder: Path, key: str, shape: tuple[int, ...]) -> Arrays | None:
    """Map stored arrays; None if there are none, or if a file is damaged.

    Mapped pages are copied when written to: no reader can change the file.
    """
    try:
        pixels = map_array(folder / f"{key}.pixels.npy", shape, np.uint8)
        labels = map_array(folder / f"{key}.labels.npy", shape[:1], np.int64)
    except (OSError, ValueError, EOFError):
        return None
    return pixels, labels


def map_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Map one array.

    Raises:
        ValueError: The file holds something else than an array of this shape and type.
    """
    array: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, want {dtype} {shape}")
    if path.stat().st_size != (want := array.offset + array.nbytes):  # type: ignore[attr-defined]
        raise ValueError(f"{path} has {path.stat().st_size} bytes, want {want}")
    return array


@contextmanager
def new(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    """Give an array that lies in a file, which gets its name when the block ends well.

    Raises:
        OSError: The disk has no room for it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        array = np.lib.format.open_memmap(part, "w+", dtype, shape)
        with part.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk met while writing kills the process
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
            yield array
            array.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
