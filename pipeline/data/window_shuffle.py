"""The order of an epoch over rows that can only be read by whole row groups.

A permutation of all rows would read a row group for each image. Here the units are permuted, runs
of them make windows of about ``WINDOW`` rows, and the rows of a window are spread over its batches.
Each unit fills few places of a batch, the same in every batch of its window: a batch has rows of
all units of the window, and a worker, which has some of those places, reads few units that another
one reads too. The order follows from the seed, the epoch, the batch size and the files; the number
of workers does not enter.

Shapes: N rows, U units, P places that one worker reads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.splits import Share, stream

WINDOW = 2048  # rows: what a shuffle reaches, and half of what the workers together hold


@dataclass(frozen=True, eq=False)
class Order:
    """An epoch's order.

    Attributes:
        row_N: For each place of the epoch the row that has it.
        turn_U: The units in the order they are read.
    """

    row_N: Tensor
    turn_U: Tensor


def windowed_order(
    size_U: Tensor, *, seed: int, epoch: int, batch_size: int, window: int = WINDOW
) -> Order:
    """Order the rows 0..N-1, which lie in units of these sizes, unit after unit."""
    generator = stream("windows", seed, epoch)
    units, n = len(size_U), int(size_U.sum())
    turn_U = torch.randperm(units, generator=generator)
    when_U = torch.empty_like(turn_U)
    when_U[turn_U] = torch.arange(units)
    when_N = when_U.repeat_interleave(size_U)
    row_N = torch.randperm(n, generator=generator)
    row_N = row_N[when_N[row_N].argsort(stable=True)]  # unit by unit, shuffled in each
    start_U = size_U[turn_U].cumsum(0) - size_U[turn_U]
    windows = max(1, round(n / window))
    window_N = (start_U * windows // n).repeat_interleave(size_U[turn_U])
    slot_N = torch.arange(n) % batch_size
    place_N = (window_N * batch_size + slot_N).argsort(stable=True)  # by window, then by slot
    ordered_N = torch.empty_like(row_N)
    ordered_N[place_N] = row_N
    return Order(ordered_N, turn_U)


@dataclass(frozen=True, eq=False)
class Reading:
    """What one worker reads, and when it has enough for a batch.

    Attributes:
        units: For each read, which unit, and which of its rows, counted in the unit.
        place_P: For each row read, its place in the worker's batches, laid end to end.
        enough: For each batch, how many rows must have been read.
    """

    units: list[tuple[int, Tensor]]
    place_P: Tensor
    enough: list[int]


def plan(order: Order, size_U: Tensor, share: Share) -> Reading:
    """Say which rows of which units a worker reads, one after the other."""
    places = share.positions(len(order.row_N))
    if not places:
        return Reading([], torch.empty(0, dtype=torch.long), [])
    row_P = order.row_N[torch.cat(places)]
    unit_N = torch.arange(len(size_U)).repeat_interleave(size_U)
    when_U = torch.empty_like(order.turn_U)
    when_U[order.turn_U] = torch.arange(len(size_U))
    place_P = when_U[unit_N[row_P]].argsort(stable=True)
    read_P = torch.empty_like(place_P)
    read_P[place_P] = torch.arange(len(place_P))
    last = read_P.view(len(places), -1).max(1).values.cummax(0).values
    unit_P = unit_N[row_P[place_P]]
    which, counts = torch.unique_consecutive(unit_P, return_counts=True)
    start_U = size_U.cumsum(0) - size_U
    inside = torch.split(row_P[place_P] - start_U[unit_P], counts.tolist())
    return Reading(list(zip(which.tolist(), inside, strict=True)), place_P, (last + 1).tolist())
