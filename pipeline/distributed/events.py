"""Event queue between the workers of a run and its driver, as a Ray actor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline.context import Event, Wish

POLL = 0.3  # seconds between two looks into the mailbox


@contextmanager
def delivering(mailbox: Any, handle: Any) -> Iterator[None]:
    """Hand the mailbox's events on from a thread, to the last one."""
    over = threading.Event()

    def deliver() -> None:
        asked, last = None, False
        while not (last and asked is None):
            if asked is None:
                last, asked = over.is_set(), mailbox.take.remote()
            try:
                events = ray.get(asked, timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue  # a machine with too much to do; to ask anew would lose this answer
            except Exception:
                return  # the cluster is gone, and the run ends with the error that says why
            asked = None
            for event in events:
                handle(event)
            over.wait(POLL)

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=300)


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds the events of a run until the driver takes them, and what the driver wishes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.wished = Wish.NONE

    def put(self, event: Event) -> Wish:
        """Add an event; return what the driver wishes."""
        self.events.append(event)
        return self.wished

    def take(self) -> list[Event]:
        """Hand over what came since the last call."""
        events, self.events = self.events, []
        return events

    def wish(self, wish: Wish) -> None:
        """Let the workers know, with their next event, what the driver wants of them."""
        self.wished = wish


def open_mailbox() -> Any:
    """Start a mailbox on this node: one elsewhere would go with the node it is on."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
