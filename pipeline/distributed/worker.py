"""What runs on each Ray worker, and the queue that carries its events to the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from pipeline import loop
from pipeline.checkpoint import CheckpointError
from pipeline.config import read
from pipeline.context import Event, Session, Signal, nothing
from pipeline.end_of_run import finish, tryout
from pipeline.optimization.state import NonFiniteError
from pipeline.storage.sync import for_worker

HOPELESS = (NonFiniteError, loop.RouterError, loop.RoomError, CheckpointError, ValueError)
"""Errors that would come again: no retry fixes them."""
EVERY = 0.3  # seconds between two reports of progress
LOOK = 5.0  # seconds between two looks whether a node is about to be taken away


class Line:
    """One worker's line to the driver: events out, signals in."""

    def __init__(self, queue: Any, rank: int, mark: Event) -> None:
        self.queue, self.rank, self.mark = queue, rank, mark
        self.last, self.looked = 0.0, time.monotonic()
        self.answer: Any = None  # to the oldest event whose answer was not read
        self.signalled, self.noticed = Signal.NONE, False

    def emit(self, event: Event) -> None:
        """Send an event; of those about progress, a few a second."""
        if event["kind"] == "progress":
            if time.monotonic() - self.last < EVERY:
                return
            self.last = time.monotonic()
        sent = self.queue.put.remote({**event, **self.mark})
        self.answer = self.answer or sent

    def signal(self) -> Signal:
        """Read the driver's last signal that has arrived here, without waiting."""
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            self.signalled, self.answer = ray.get(self.answer), None
        if self.signalled is Signal.NONE and time.monotonic() - self.looked > LOOK:
            self.looked = time.monotonic()
            return Signal.LOOK
        return self.signalled

    def notice(self) -> bool:
        """Ask Ray whether a node of this run is about to be taken away, with all workers."""
        info = ray.train.get_preemption_info()
        if info is not None and not self.noticed and self.rank == 0:
            self.noticed = True
            nodes = ", ".join(node[:8] for node in info.preempted_node_ids)
            text = f"node {nodes} is about to be taken away: a checkpoint every {LOOK:.0f} s"
            self.emit({"kind": "warning", "text": text})
        return info is not None


def work(settings: Mapping[str, Any]) -> str:
    """Train on this worker; return how it ended: ``finished``, ``stopped`` or ``failed``.

    Args:
        settings: ``config`` (flat), ``folder`` (absolute) and ``queue``; of a sweep's trial its
            name as ``trial``, which all its events then carry.
    """
    mark = {"trial": settings["trial"]} if "trial" in settings else {}
    torch.set_num_threads(1)
    context, queue = ray.train.get_context(), settings["queue"]
    folder = Path(settings["folder"])
    line = Line(queue, context.get_world_rank(), mark)
    session = Session(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        emit=line.emit,
        report=lambda metrics: ray.train.report(dict(metrics)),
        signal=line.signal,
        notice=line.notice,
    )
    try:
        session = replace(session, kept=for_worker(folder) or nothing)
        config, end = read(settings["config"]), tryout if mark else finish
        metrics = loop.fit(config, folder, session, end)
        ending: Event = {"kind": "finished", "metrics": metrics}
    except loop.Stopped as stop:
        ending = {"kind": "stopped", "text": str(stop)}
    except HOPELESS as error:
        ending = {"kind": "failed", "text": f"{type(error).__name__}: {error}"}
    if session.rank == 0 or ending["kind"] == "failed":
        ray.get(queue.put.remote({**ending, **mark}))
    return str(ending["kind"])
