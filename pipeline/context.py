"""Where a run happens: which worker this is, and how it reaches the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Event = Mapping[str, Any]
T = TypeVar("T")


class Signal(IntEnum):
    """What the first worker was asked for since the last update."""

    NONE = 0
    LOOK = 1  # whether a node is about to be taken away: all workers must look at once
    SAVE = 2  # a checkpoint now
    STOP = 3  # a checkpoint now, and the end


def lasting(error: Exception) -> bool:
    """Whether an error would come again: wrong data do, a lost process does not."""
    return isinstance(error, ValueError)


def ignore(_: Event) -> None:
    """Take an event and do nothing."""


def nothing() -> None:
    """Do nothing."""


def undisturbed() -> Signal:
    """Be asked for nothing."""
    return Signal.NONE


def unnoticed() -> bool:
    """Know of no node that is about to be taken away."""
    return False


@dataclass(frozen=True)
class Session:
    """One worker's place in a run. The default is a run of one process, without Ray.

    Attributes:
        rank, world: This worker, and how many there are.
        device: Where it computes.
        emit: Takes events of rank 0 (metrics, progress, warnings) to whoever follows the run.
        report: Called by every worker after each epoch with the same metrics.
        kept: Called by rank 0 after each checkpoint, and when the last files are written.
        signal: What was asked of this worker; that of rank 0 counts.
        notice: Whether a node is about to be taken away; all workers ask at once.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    emit: Callable[[Event], None] = ignore
    report: Callable[[Mapping[str, float]], None] = ignore
    kept: Callable[[], None] = nothing
    signal: Callable[[], Signal] = undisturbed
    notice: Callable[[], bool] = unnoticed

    @property
    def average(self) -> Callable[[Tensor], None]:
        """The in-place mean over the workers."""
        if self.world == 1:
            return keep

        def average(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat /= self.world

        return average

    def total(self, tensor: Tensor) -> None:
        """Sum over the workers, in place."""
        if self.world > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)

    def in_step(self, items: Iterator[T]) -> Iterator[T]:
        """Pass items on as long as every worker has one; an error of one ends all of them.

        A worker that stopped alone, say at a damaged image of its part, would leave the others
        waiting for it in the next update.

        Raises:
            ValueError: Another worker has no item, or met an error that would come again.
            RuntimeError: Another worker met an error of another kind.
        """
        if self.world == 1:
            yield from items
            return
        while True:
            item, trouble, error = None, torch.zeros(2, device=self.device), None
            try:
                item = next(items)
            except StopIteration:
                trouble[0] = 1
            except Exception as caught:
                trouble[1], error = 1, caught
            dist.all_reduce(trouble)
            ended, failed = (int(count) for count in trouble.tolist())
            if failed or 0 < ended < self.world:
                self._raise(error, f"{ended} of {self.world} workers had no batch")
            if ended:
                return
            assert item is not None
            yield item

    def share_fate(self, error: Exception | None) -> None:
        """Raise on every worker what one of them met, so that none waits for it in vain."""
        if self.world == 1:
            if error:
                raise error
            return
        trouble = torch.tensor(float(error is not None), device=self.device)
        dist.all_reduce(trouble)
        if trouble.item():
            self._raise(error, "a worker failed")

    def _raise(self, error: Exception | None, default: str) -> NoReturn:
        told: list[tuple[bool, str] | None] = [None] * self.world
        dist.all_gather_object(told, (lasting(error), str(error)) if error else None)
        same, reason = next(filter(None, told), (True, default))
        raise error or (ValueError if same else RuntimeError)(reason)

    def asked(self) -> Signal:
        """Hear what rank 0 was asked for; the same on every worker."""
        signal = self.signal() if self.rank == 0 else Signal.NONE
        if self.world == 1:
            return signal
        heard = torch.tensor(int(signal), device=self.device)
        dist.broadcast(heard, 0)
        return Signal(int(heard))

    def tell(self, kind: str, **fields: Any) -> None:
        """Emit an event, on rank 0."""
        if self.rank == 0:
            self.emit({"kind": kind, **fields})

    def wait(self) -> None:
        """Wait for the other workers."""
        if self.world > 1:
            dist.barrier()


def best_device() -> torch.device:
    """A GPU if torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep(flat: Tensor) -> None:
    """Average over one worker: leave the numbers as they are."""
