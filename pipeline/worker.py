"""What runs on each Ray worker, and the mailbox that carries its events to the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from pipeline import loop
from pipeline.checkpoint import CheckpointError
from pipeline.config import read
from pipeline.session import Event, Session, nothing
from pipeline.state import NonFiniteError
from pipeline.stores import for_worker

HOPELESS = (NonFiniteError, loop.RouterError, CheckpointError, ValueError)
"""Errors that would come again: all workers meet them at one place, and no retry mends them."""
EVERY = 0.3  # seconds between two reports of progress


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds the events of a run until the driver takes them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        """Add an event."""
        self.events.append(event)

    def take(self) -> list[Event]:
        """Hand over what came since the last call."""
        events, self.events = self.events, []
        return events


def work(settings: Mapping[str, Any]) -> None:
    """Train on this worker.

    Args:
        settings: ``config`` (flat), ``folder`` (absolute) and ``mailbox``.
    """
    torch.set_num_threads(1)
    context, mailbox, last = ray.train.get_context(), settings["mailbox"], 0.0

    def emit(event: Event) -> None:
        nonlocal last
        if event["kind"] == "progress":
            if time.monotonic() - last < EVERY:
                return
            last = time.monotonic()
        mailbox.put.remote(dict(event))

    fetched = for_worker(Path(settings["folder"]))
    session = Session(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        emit=emit,
        report=lambda metrics: ray.train.report(dict(metrics)),
        kept=fetched or nothing,
    )
    try:
        metrics = loop.fit(read(settings["config"]), Path(settings["folder"]), session)
        ending = {"kind": "finished", "metrics": metrics}
    except HOPELESS as error:
        ending = {"kind": "failed", "text": f"{type(error).__name__}: {error}"}
    if session.rank == 0:
        ray.get(mailbox.put.remote(ending))
