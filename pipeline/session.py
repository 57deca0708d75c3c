"""Where a run happens: which worker this is, and how it reaches the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.state import keep

Event = Mapping[str, Any]


def ignore(_: Event) -> None:
    """Take an event and do nothing."""


@dataclass(frozen=True)
class Session:
    """One worker's place in a run. The default is a run of one process, without Ray.

    Attributes:
        rank, world: This worker, and how many there are.
        device: Where it computes.
        emit: Takes events of rank 0 (metrics, progress, warnings) to whoever follows the run.
        report: Called by every worker after each epoch with the same metrics.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    emit: Callable[[Event], None] = ignore
    report: Callable[[Mapping[str, float]], None] = ignore

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
