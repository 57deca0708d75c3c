"""Event queue between the workers of a run and its driver, as a Ray actor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline.context import Event, Signal

POLL = 0.3  # seconds between two looks into the queue


@contextmanager
def delivering(queue: Any, handle: Any) -> Iterator[None]:
    """Hand the queue's events on from a thread, to the last one."""
    over = threading.Event()

    def deliver() -> None:
        asked, last = None, False
        while not (last and asked is None):
            if asked is None:
                last, asked = over.is_set(), queue.take.remote()
            try:
                events = ray.get(asked, timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue  # a machine with too much to do; to ask again would lose this answer
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
class EventQueue:
    """Holds the events of a run until the driver takes them, and what signal the driver sent."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.signalled = Signal.NONE

    def put(self, event: Event) -> Signal:
        """Add an event; return what signal the driver sent."""
        self.events.append(event)
        return self.signalled

    def take(self) -> list[Event]:
        """Hand over what came since the last call."""
        events, self.events = self.events, []
        return events

    def signal(self, signal: Signal) -> None:
        """Let the workers know, with their next event, what the driver wants of them."""
        self.signalled = signal


def open_event_queue() -> Any:
    """Start a queue on this node: one elsewhere would go with the node it is on."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventQueue.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
