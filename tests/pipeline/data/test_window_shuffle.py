"""The order of a streamed epoch against its slow definition, and what a worker reads for it."""

import pytest
import torch
from torch import Tensor

from pipeline.data.splits import Share, stream
from pipeline.data.window_shuffle import Reading, plan, windowed_order

SIZES = torch.tensor([5, 9, 1, 7, 7, 3, 12, 4, 8, 6])


def ordered(size_U: Tensor = SIZES, epoch: int = 0, batch_size: int = 8, window: int = 20):
    return windowed_order(size_U, seed=3, epoch=epoch, batch_size=batch_size, window=window)


def slow_order(sizes: list[int], epoch: int, batch_size: int, window: int) -> list[int]:
    """Shuffle the units, fill windows with whole ones, and deal each window's rows out by slots."""
    generator = stream("windows", 3, epoch)
    n, first = sum(sizes), [sum(sizes[:u]) for u in range(len(sizes))]
    turns = torch.randperm(len(sizes), generator=generator).tolist()
    shuffled = torch.randperm(n, generator=generator).tolist()
    windows: dict[int, list[int]] = {}
    start = 0
    for unit in turns:
        number = start * max(1, round(n / window)) // n
        own = range(first[unit], first[unit] + sizes[unit])
        windows.setdefault(number, []).extend(row for row in shuffled if row in own)
        start += sizes[unit]
    order, low = [0] * n, 0
    for rows in windows.values():
        places = range(low, low + len(rows))
        for place, row in zip(sorted(places, key=lambda p: p % batch_size), rows, strict=True):
            order[place] = row
        low += len(rows)
    return order


@pytest.mark.parametrize("batch_size", [4, 8, 62])
@pytest.mark.parametrize("window", [1, 20, 1000])
@pytest.mark.parametrize("epoch", [0, 1])
def test_order_equals_its_slow_definition(epoch: int, batch_size: int, window: int) -> None:
    found = ordered(epoch=epoch, batch_size=batch_size, window=window).row_N.tolist()
    assert found == slow_order(SIZES.tolist(), epoch, batch_size, window)
    assert sorted(found) == list(range(62)), "a permutation"


def test_epochs_differ_and_come_again() -> None:
    assert not torch.equal(ordered().row_N, ordered(epoch=1).row_N)
    assert torch.equal(ordered().row_N, ordered().row_N)


def follow(reading: Reading, size_U: Tensor, batches: int) -> list[list[int]]:
    """Read as a worker does: return the rows of its batches; nothing else may be read."""
    start_U = size_U.cumsum(0) - size_U
    rows = [int(start_U[unit]) + int(i) for unit, inside in reading.units for i in inside]
    places = dict(zip(reading.place_P.tolist(), rows, strict=True))
    size = len(rows) // batches
    came = [set(reading.place_P[:enough].tolist()) for enough in reading.enough]
    for step, there in enumerate(came):
        assert set(range((step + 1) * size)) <= there, "the batch is there when it is said to be"
    return [[places[step * size + i] for i in range(size)] for step in range(batches)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 3])
def test_workers_read_what_the_order_gives_them_and_nothing_else(world: int, first: int) -> None:
    order, steps = ordered(), 62 // 8
    parts = []
    for rank in range(world):
        share = Share(seed=3, epoch=0, first=first, batch_size=8, rank=rank, world=world)
        parts.append(follow(plan(order, SIZES, share), SIZES, steps - first))
    batches = [[r for rows in step for r in rows] for step in zip(*parts, strict=True)]
    assert batches == order.row_N[first * 8 : steps * 8].view(-1, 8).tolist()


def test_nothing_is_read_for_an_epoch_that_is_over() -> None:
    reading = plan(ordered(), SIZES, Share(seed=3, epoch=0, first=7, batch_size=8))
    assert (reading.units, reading.enough) == ([], [])


def test_workers_share_few_units_and_hold_few_rows() -> None:
    """80 units of 100 rows, windows of 2,000: as ImageNet's files are, in small."""
    size_U, world = torch.full((80,), 100), 4
    order = ordered(size_U, batch_size=64, window=2000)
    read, held = 0, 0
    for rank in range(world):
        share = Share(seed=3, epoch=0, first=0, batch_size=64, rank=rank, world=world)
        reading = plan(order, size_U, share)
        read += len(reading.units)
        held = max(held, *(enough - 16 * step for step, enough in enumerate(reading.enough)))
    assert read <= 80 + 4 * world, "each window's border between workers splits one unit"
    assert held <= 1.1 * 2000 / world, "about one window over all workers"


def test_batches_mix_the_units_of_a_window() -> None:
    size_U = torch.full((80,), 100)
    row_N = ordered(size_U, batch_size=64, window=2000).row_N
    units = [len((rows // 100).unique()) for rows in row_N[: 125 * 64].view(125, 64)]
    assert min(units) >= 18
