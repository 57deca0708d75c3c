"""Streams against a slow reading of the same files; with threads, with Ray, and interrupted."""

import io
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import streaming
from pipeline.data.crops import RandomCrop
from pipeline.data.files import DamagedDataError, find_shards
from pipeline.data.parquet import Layout
from pipeline.data.row_groups import UNIT, Index, Unit, in_threads, read_index
from pipeline.data.splits import Share
from pipeline.data.streaming import Streamed
from pipeline.data.window_shuffle import windowed_order

LAYOUT = Layout("label", 1000)
KINDS = [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG")]
Batches = list[tuple[torch.Tensor, torch.Tensor]]
SHARDS = (23, 9, 30)
ROWS = sum(SHARDS)


def encoded(row: int) -> bytes:
    """An image whose size, mode and format change from row to row."""
    mode, kind = KINDS[row % len(KINDS)]
    width, height = 24 + 7 * row % 41, 20 + 11 * row % 37
    noise = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, write: Callable) -> Path:
    """Three shards in row groups of seven; a row's label is its number, and tells it apart."""
    start = 0
    for shard, size in enumerate(SHARDS):
        rows = range(start, start + size)
        name = f"train-{shard:05}-of-{len(SHARDS):05}.parquet"
        write(tmp_path / "set" / name, [encoded(r) for r in rows], list(rows), rows=7)
        start += size
    return tmp_path / "set"


def streamed(folder: Path, skip: int = 0, reader: str = "threads") -> Streamed:
    index = read_index(find_shards(folder, "train"), LAYOUT)
    return Streamed(index, np.arange(skip, ROWS), LAYOUT, 16, 0.2, reader)  # type: ignore[arg-type]


def share(**changes: int) -> Share:
    return Share(**{"seed": 1, "epoch": 2, "first": 0, "batch_size": 8} | changes)


def joined(stream: Streamed, world: int, **changes: int) -> Batches:
    """Batches of all workers put together."""
    parts = [list(stream.batches(share(rank=r, world=world, **changes))) for r in range(world)]
    return put_together(parts)


def put_together(parts: list[Batches]) -> Batches:
    return [
        (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))
        for step in zip(*parts, strict=True)
    ]


def by_row(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Pixels by the number of the row, in the order in which they came."""
    return {int(y): x for x_BCHW, y_B in batches for x, y in zip(x_BCHW, y_B, strict=True)}


def same(one: Batches, other: Batches) -> None:
    assert len(one) == len(other)
    for (x, y), (u, v) in zip(one, other, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_a_stream_is_every_image_in_the_order_of_the_epoch(folder: Path) -> None:
    stream, view = streamed(folder), RandomCrop(16, 0.2, 1, 2)
    sizes = torch.tensor([7, 7, 7, 2, 7, 2, 7, 7, 7, 7, 2])
    order_N = windowed_order(sizes, seed=1, epoch=2, batch_size=8).row_N
    found = list(stream.batches(share()))
    assert len(found) == ROWS // 8
    for step, (x_BCHW, y_B) in enumerate(found):
        rows = order_N[8 * step : 8 * step + 8].tolist()
        assert y_B.tolist() == rows
        for pixels, row in zip(x_BCHW.numpy(), rows, strict=True):
            picture = Image.open(io.BytesIO(encoded(row))).convert("RGB")
            np.testing.assert_array_equal(pixels, view(picture, row))


def test_a_subset_keeps_the_crops_of_its_images(folder: Path) -> None:
    every = by_row(streamed(folder).batches(share()))
    stream = streamed(folder, skip=11)
    assert len(stream) == ROWS - 11
    some = by_row(stream.batches(share()))
    both = every.keys() & some.keys()
    assert min(some) >= 11
    assert len(both) > 30
    assert all(torch.equal(every[row], some[row]) for row in both)


@pytest.mark.parametrize("world", [2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, world: int) -> None:
    same(joined(streamed(folder), world), joined(streamed(folder), 1))


@pytest.mark.parametrize("first", [1, 4, 7])
def test_a_stream_goes_on_from_any_batch(folder: Path, first: int) -> None:
    same(joined(streamed(folder), 2, first=first), joined(streamed(folder), 2)[first:])


def test_epochs_have_other_orders_and_other_crops(folder: Path) -> None:
    one, two = (by_row(joined(streamed(folder), 1, epoch=epoch)) for epoch in (0, 1))
    assert list(one) != list(two)
    changed = [not torch.equal(one[row], two[row]) for row in one.keys() & two.keys()]
    assert sum(changed) > 0.9 * len(changed)


def test_large_row_groups_are_read_in_pieces(tmp_path: Path, write: Callable) -> None:
    rows = UNIT + 40
    write(tmp_path / "train-00000-of-00001.parquet", [encoded(1)] * rows, [0] * rows, rows=rows)
    index = read_index(find_shards(tmp_path, "train"), LAYOUT)
    assert [len(unit) for unit in index.units(np.arange(rows))] == [UNIT, 40]
    assert [len(unit) for unit in index.units(np.arange(0, rows, 10))] == [30]


def test_damage_names_file_and_row(tmp_path: Path, write: Callable) -> None:
    data = [encoded(row) for row in range(12)]
    data[9] = data[9][:-30]
    write(tmp_path / "train-00000-of-00001.parquet", data, list(range(12)), rows=4)
    index = read_index(find_shards(tmp_path, "train"), LAYOUT)
    stream = Streamed(index, np.arange(12), LAYOUT, 16, 0.2, "threads")
    with pytest.raises(DamagedDataError, match=r"00001\.parquet: row 9: image cannot be decoded"):
        list(stream.batches(share(batch_size=4)))


def test_a_file_that_shrank_is_noticed(folder: Path, write: Callable) -> None:
    stream = streamed(folder)
    write(folder / "train-00001-of-00003.parquet", [encoded(0)] * 3, [0] * 3)
    with pytest.raises(DamagedDataError, match=r"00001-of-00003\.parquet"):
        list(stream.batches(share()))


def test_threads_run_ahead_no_further_than_they_may() -> None:
    lock, started = threading.Lock(), []
    units = [Unit(Path("x"), number, 0, 0, np.arange(5)) for number in range(50)]

    def decode(unit: Unit) -> np.ndarray:
        with lock:
            started.append(unit.group)
        return np.full(1, unit.group, np.uint8)

    pieces = in_threads(units, decode, ahead=20, threads=3)
    for number, piece in enumerate(pieces):
        assert piece[0] == number
        with lock:
            assert max(started) <= number + 5
        if number == 30:
            break
    pieces.close()  # type: ignore[attr-defined]
    assert max(started) < 40


def test_labels_out_of_range_are_found_before_training(tmp_path: Path, write: Callable) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", [b"x"] * 3, [0, 1000, 2])
    with pytest.raises(DamagedDataError, match=r"row 1: label must be in 0\.\.999, got 1000"):
        read_index(find_shards(tmp_path, "train"), LAYOUT)


def test_two_ray_workers_stream_every_image_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster whose CPUs the workers hold; then one meets damage, and Ray stays usable."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(__file__).parents[3])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )

    @ray.remote(num_cpus=1)
    class Worker:
        def read(self, index: Index, of: Share) -> Batches:
            stream = Streamed(index, np.arange(ROWS), LAYOUT, 16, 0.2)  # reader: auto
            return list(stream.batches(of))

        def wait(self, index: Index) -> float:
            """CPU seconds of two seconds in which a full window waits to be taken."""
            streaming.WINDOW = 8
            stream = Streamed(index, np.arange(ROWS), LAYOUT, 256, 0.2)
            pieces = stream.read(stream.units, RandomCrop(256, 0.2, 0, 0), 1)
            next(pieces)
            time.sleep(1)
            before = time.process_time()
            time.sleep(2)
            spent = time.process_time() - before
            assert sum(map(len, pieces)) == ROWS - 7
            return spent

    try:
        index = read_index(find_shards(folder, "train"), LAYOUT)
        workers = [Worker.remote() for _ in range(2)]

        def read(**changes: int) -> list[Batches]:
            wanted = [share(rank=rank, world=2, **changes) for rank in range(2)]
            calls = [w.read.remote(index, of) for w, of in zip(workers, wanted, strict=True)]
            return ray.get(calls, timeout=200)

        for epoch in (0, 1):
            parts = read(epoch=epoch)
            seen = [int(row) for part in parts for _, y_B in part for row in y_B]
            assert len(seen) == len(set(seen)) == ROWS // 8 * 8
            same(put_together(parts), joined(streamed(folder), 1, epoch=epoch))
        resumed = read(epoch=1, first=5)
        for part, whole in zip(resumed, parts, strict=True):
            same(part, whole[5:])
        waited = workers[0].wait.remote(index)
        assert ray.get(waited, timeout=200) < 0.5
        file = folder / "train-00002-of-00003.parquet"
        file.write_bytes(file.read_bytes()[:2000])
        with pytest.raises(ray.exceptions.RayTaskError, match="00002-of-00003"):
            read(epoch=3)
    finally:
        ray.shutdown()
