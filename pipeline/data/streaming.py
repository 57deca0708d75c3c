"""Training images that no memory holds: read, decoded and cropped while the model trains.

The order of an epoch is fixed before anything is read (``order.py``), every worker asks for its
own rows of it by file, row group and row, and Ray Data decodes them in that order. Ray Data's
``streaming_split`` was the alternative: it deals rows out as they come, so that what a worker gets
differs from run to run, rows may be dropped to make the parts equal, and no offset continues it.

Each image comes once an epoch over all workers, but for a last batch that is not full; a run that
stops in an epoch reads on from the next batch, none twice. Memory: two windows of decoded images
over all workers, 0.6 GB at 224 px, and one row group of encoded ones for each task or thread.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.crops import RandomCrop, View
from pipeline.data.files import DamagedDataError, place
from pipeline.data.parquet import Layout
from pipeline.data.row_groups import Index, Unit, cores, decode_unit, in_threads
from pipeline.data.splits import Share
from pipeline.data.window_shuffle import WINDOW, plan, windowed_order

if TYPE_CHECKING:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

Reader = Literal["auto", "ray", "threads"]
Decode = Callable[[Unit], NDArray[np.uint8]]
REST = 0.1  # s between two steps of Ray Data's scheduler


@dataclass(frozen=True, eq=False)
class Streamed:
    """Rows of a split as random crops.

    Attributes:
        index: Where the rows are.
        rows_N: Which of them, ascending.
        layout, size, min_area: Columns of the files; side of a crop, and its least area.
        reader: ``ray``: Ray Data; ``threads``: of this process; ``auto``: Ray Data in a process
            that Ray started. The batches are the same.
    """

    index: Index
    rows_N: NDArray[np.int64]
    layout: Layout
    size: int
    min_area: float
    reader: Reader = "auto"
    units: list[Unit] = field(init=False)
    labels_N: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", self.index.units(self.rows_N))
        object.__setattr__(self, "labels_N", torch.from_numpy(self.index.labels_N[self.rows_N]))

    def __len__(self) -> int:
        return len(self.rows_N)

    def batches(self, share: Share) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in an order that is a permutation of all images.

        Raises:
            DamagedDataError: An image cannot be read; names file and row.
        """
        size_U = torch.tensor([len(unit) for unit in self.units])
        order = windowed_order(
            size_U, seed=share.seed, epoch=share.epoch, batch_size=share.batch_size
        )
        reading = plan(order, size_U, share)
        view = RandomCrop(self.size, self.min_area, share.seed, share.epoch)
        units = [self.units[number].pick(inside.numpy()) for number, inside in reading.units]
        pieces = self.read(units, view, share.world)
        places, held, read = reading.place_P.tolist(), dict[int, NDArray[np.uint8]](), 0
        for step, place_B in enumerate(share.positions(len(self))):
            while read < reading.enough[step]:
                for pixels in next(pieces):
                    held[places[read]] = pixels
                    read += 1
            size = len(place_B)
            mine = [held.pop(place) for place in range(step * size, (step + 1) * size)]
            yield torch.from_numpy(np.stack(mine)), self.labels_N[order.row_N[place_B]]

    def read(self, units: list[Unit], view: View, world: int) -> Iterator[NDArray[np.uint8]]:
        """Decode units in order, a window ahead of what was taken."""
        decode = partial(decode_unit, layout=self.layout, view=view)
        ahead, at_once = max(1, WINDOW // world), max(1, cores() // world)
        if self.reader == "ray" or (self.reader == "auto" and in_ray_worker()):
            return in_ray(units, decode, ahead=ahead * 3 * self.size**2, tasks=at_once)
        return in_threads(units, decode, ahead=ahead, threads=at_once)


def in_ray_worker() -> bool:
    """Whether Ray started this process."""
    if "ray" not in sys.modules:
        return False
    import ray

    mode = ray.get_runtime_context().worker.mode if ray.is_initialized() else None
    return bool(mode == ray.WORKER_MODE)


def in_ray(
    units: list[Unit], decode: Decode, *, ahead: int, tasks: int
) -> Iterator[NDArray[np.uint8]]:
    """Decode units in order by Ray Data, ``tasks`` at a time; ``ahead``: bytes it may hold ready.

    The tasks ask for no CPU of Ray's: on a small cluster the training workers hold them all, and
    a task that waited for one would wait for ever.
    """
    import ray.data
    from ray.data import ExecutionResources

    if not units:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [resting()]
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=ahead)
    rows = [as_row(unit) for unit in units]
    with ray.data.DataContext.current(context):
        # not from_arrow: that counts rows by a task, which asks for a CPU
        decoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            partial(decode_row, decode=decode),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=tasks,
        )
    for block in decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        if error := next((text for text in block["error"] if text), None):
            raise DamagedDataError(error)
        yield np.array(block["pixels"])  # a copy: what Ray holds may go


def resting() -> type["ExecutionCallback"]:
    """Make what lets Ray Data's scheduler rest after each step.

    While a full window waits to be taken, the scheduler (a thread of the training process) looks
    for work without a pause, and so takes the interpreter from the training: with two workers on
    two cores that halved it (57 images/s, where training alone made 111).
    """
    # ray.data exports no base class for custom_execution_callback_classes
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Resting(ExecutionCallback):  # type: ignore[misc]
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(REST)

    return Resting


def as_row(unit: Unit) -> dict[str, Any]:
    """Write a unit as plain values."""
    return {
        "file": getattr(unit.file, "uri", str(unit.file)),
        "group": unit.group,
        "first": unit.first,
        "offset": unit.offset,
        "rows": unit.rows.tolist(),
    }


def decode_row(table: Any, *, decode: Decode) -> dict[str, Any]:
    """Decode the unit that a table of one row names; damage comes back as text."""
    (row,) = table.to_pylist()
    rows = np.array(row["rows"], np.int64)
    unit = Unit(place(row["file"]), row["group"], row["first"], row["offset"], rows)
    try:
        pixels, error = decode(unit), ""
    except DamagedDataError as damage:
        pixels, error = np.zeros((1, 1, 1, 1), np.uint8), str(damage)
    return {"pixels": pixels, "error": [error] * len(pixels)}
