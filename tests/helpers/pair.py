"""Two worker processes of one run, without Ray."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_pair(work: Callable[..., None], folder: Path, *given: Any) -> None:
    """Call ``work(rank, folder, *given)`` in two processes of a gloo group."""
    mp.spawn(_member, (work, str(folder), *given), nprocs=2)


def _member(rank: int, work: Callable[..., None], folder: str, *given: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(rank, folder, *given)
    os._exit(0)  # torch takes gloo's threads down at exit, and now and then aborts over it
