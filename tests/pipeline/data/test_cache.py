"""Decoded images are made once, shared, and never trusted blindly."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.cache import Arrays, cached

SHAPE = (5, 3, 4, 4)


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.calls += 1
        time.sleep(0.05)
        pixels[:] = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
        labels[:] = np.arange(5)


def same(found: Arrays) -> None:
    want = np.empty(SHAPE, np.uint8), np.empty(5, np.int64)
    Maker()(*want)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_arrays_are_made_once_and_the_same_ever_after(cache_folder: Path) -> None:
    make = Maker()
    same(cached("key", SHAPE, make))
    same(cached("key", SHAPE, make))
    assert make.calls == 1
    assert not [path for path in cache_folder.iterdir() if path.name.startswith(".")]
    assert cache_folder.stat().st_mode & 0o077 == 0


def test_workers_at_the_same_time_make_them_once() -> None:
    make = Maker()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: cached("key", SHAPE, make), range(4)):
            same(found)
    assert make.calls == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"1234")


def replace(path: Path) -> None:
    np.save(path, np.zeros((5, 3, 4, 5), np.uint8))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("hurt", [cut, lengthen, replace, empty, pickled, Path.unlink])
@pytest.mark.parametrize("part", ["pixels", "labels"])
def test_damaged_files_are_made_anew(
    cache_folder: Path, hurt: Callable[[Path], None], part: str
) -> None:
    make = Maker()
    cached("key", SHAPE, make)
    hurt(cache_folder / f"key.{part}.npy")
    same(cached("key", SHAPE, make))
    assert make.calls == 2


def test_writing_to_mapped_pixels_leaves_the_file_alone() -> None:
    make = Maker()
    cached("key", SHAPE, make)
    cached("key", SHAPE, make)[0][:] = 0
    same(cached("key", SHAPE, make))
    assert make.calls == 1


def test_a_folder_that_cannot_be_used_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROBUST_MOE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="decoded images are not kept in"):
        same(cached("key", SHAPE, Maker()))


def test_an_error_while_making_is_passed_on_and_leaves_nothing(cache_folder: Path) -> None:
    def fail(pixels: np.ndarray, labels: np.ndarray) -> None:
        raise ValueError("row 3")

    with pytest.raises(ValueError, match="row 3"):
        cached("key", SHAPE, fail)
    same(cached("key", SHAPE, Maker()))
