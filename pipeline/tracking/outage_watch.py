"""Outages as errors, for runs that are worth nothing without their record."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.tracking.tracker import OutageError, Tracker

POLL = 0.3  # seconds between two looks at the tracker


@contextmanager
def strictly(tracker: Tracker) -> Iterator[None]:
    """End the block, as SIGTERM does, once MLflow has been away for longer than the run waits.

    Does nothing for a tracker that is not strict.

    Raises:
        OutageError: MLflow was away for too long.
    """
    over, found = threading.Event(), list[OutageError]()

    def watch() -> None:
        while not over.wait(POLL):
            if tracker.away > tracker.patience:
                found.append(tracker.outage())
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="strict-tracking", daemon=True)
    if tracker.strict:
        thread.start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if found:
            raise found[0] from None
        raise
    finally:
        over.set()
        if tracker.strict:
            thread.join()
