"""What the driver hears, and what it makes of an error of Ray's."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipeline.distributed import worker_group
from pipeline.distributed.worker_group import RoomTimeoutError, Stop, cause, crowded_out, listening


def test_sigterm_may_come_twice_and_ctrl_c_again_ends_at_once() -> None:
    said: list[str] = []
    stop = Stop(said.append)
    assert (stop.since, stop.overdue) == (0.0, False)
    stop.hear(signal.SIGTERM)
    stop.hear(signal.SIGTERM)
    assert stop.since > 0
    assert not stop.overdue
    stop.hear(signal.SIGINT)
    assert stop.overdue
    assert said == ["stopping at the next update, with a checkpoint"]
    first = Stop(said.append)
    first.hear(signal.SIGINT)
    assert not first.overdue


def test_nobody_is_waited_for_longer_than_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop(lambda _: None)
    stop.hear(signal.SIGTERM)
    monkeypatch.setattr(worker_group, "GRACE", -1.0)
    assert stop.overdue


def test_signals_are_heard_for_the_block_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening(lambda _: None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.since > 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[object] = []

    def look() -> None:
        with listening(lambda _: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


class WorkerGroupStartupTimeoutError(Exception):
    """As Ray names it."""


class ControllerError(Exception):
    """As Ray has it."""

    def __init__(self, failure: Exception):
        super().__init__(f"Training failed due to controller error:\n{failure}")
        self.controller_failure = failure


def test_want_of_room_is_told_from_what_fails() -> None:
    assert crowded_out(ControllerError(WorkerGroupStartupTimeoutError("too late")))
    assert crowded_out(RoomTimeoutError("no room"))
    assert not crowded_out(ControllerError(ValueError("wrong")))
    assert not crowded_out(ValueError("wrong"))


def test_cause_is_the_innermost_error_in_one_line() -> None:
    outer = RuntimeError("Traceback:\n  somewhere\nlast line\n")
    outer.__cause__ = KeyError("deep\n\n")
    assert cause(outer) == "KeyError: 'deep\\n\\n'"
    assert cause(RuntimeError("a\nb\n\n")) == "RuntimeError: b"
    assert cause(RuntimeError("")) == "RuntimeError: no message"
