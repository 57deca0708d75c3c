"""Runs cells as processes, as many at a time as there is room for, and stops them cleanly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli.arguments import PREEMPTED
from pipeline.cli.console import span
from pipeline.config import Config
from pipeline.config.overrides import flatten
from pipeline.grid.cell_log import CellLog, shares
from pipeline.storage.run_folder import shown
from pipeline.tracking.queries import PARENT

POLL = 0.2  # seconds between two looks at the processes
EVERY = 60.0  # seconds between two lines about cells that run
GRACE = 60.0  # seconds that stopped cells have to write down where they are
AGAIN = 3  # times that a cell is started again after it lost its place
Say = Callable[[str], None]


@dataclass
class Running:
    """A cell's process, and the file that its lines go to: a pipe would break with the grid."""

    place: int
    process: subprocess.Popen[str]
    output: Path
    start: int  # of this attempt's lines in the log
    began: float
    shown: str = ""  # the last of its lines that was passed on

    def lines(self) -> list[str]:
        """Read what this attempt has said so far."""
        with self.output.open("rb") as file:
            file.seek(self.start)
            text = file.read().decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def reason(self) -> str:
        """Tell why it failed, by its own last words."""
        said = self.lines()
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        return (errors or said or [""])[-1]


def drive(
    log: CellLog,
    waiting: list[int],
    slots: int,
    *,
    address: str,
    say: Say,
    room: Callable[[], int] | None = None,
) -> None:
    """Run the cells at these positions to their ends; one that fails does not stop the others.

    A cell that was stopped by somebody else, or whose node was lost and nothing is free, waits
    behind the others and goes on.

    Args:
        slots: Most processes at a time.
        room: Tells how many there is room for at the moment, after nodes were lost or joined.
        address: Of the Ray that all of them join.

    Raises:
        KeyboardInterrupt, SystemExit: The grid was stopped; so were its cells before this returns.
    """
    waiting, running, spoke = list(waiting), list[Running](), time.monotonic()
    total, again = len(log.entries), Counter[int]()
    try:
        while waiting or running:
            while waiting and len(running) < (min(slots, max(1, room())) if room else slots):
                running.append(child := start(log, waiting.pop(0), address))
                place = f"[{child.place + 1}/{total}]"
                say(f"{place} {log.entries[child.place].key} started; {shown(child.output)}")
                spoke = time.monotonic()
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                if child.process.returncode == PREEMPTED and again[child.place] < AGAIN:
                    again[child.place] += 1
                    waiting.append(child.place)
                say(ending(log, child, len(waiting) + len(running)))
                spoke = time.monotonic()
            if time.monotonic() - spoke > EVERY:
                for child in running:
                    if (last := (child.lines() or ["starting"])[-1]) != child.shown:
                        say(f"    {log.entries[child.place].key}: {last}")
                    child.shown = last
                spoke = time.monotonic()
            time.sleep(POLL)
    except (KeyboardInterrupt, SystemExit):
        say(f"stopping {len(running)} cell(s); once more to kill them")
        stop(running)
        for child in running:
            log.stopped(child.place)
        raise


def start(log: CellLog, place: int, address: str) -> Running:
    """Start a cell's process."""
    config = log.request.configs[place]
    output = log_of(log.folder, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    size = output.stat().st_size if output.exists() else 0
    log.write(place, "running")
    with output.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pipeline.grid.cell_process"],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": import_path(), "RAY_ADDRESS": address},
            start_new_session=True,  # Ctrl-C is for the grid, which then stops its cells
        )
    parent = log.tracker.run_id
    tags = {PARENT: parent} if parent else {}
    request = {"config": flatten(config), "tags": tags, "strict": log.tracker.strict}
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once, as its exit code says
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()  # and kept open: its end means that the grid is gone
    return Running(place, process, output, size, time.monotonic())


def ending(log: CellLog, child: Running, left: int) -> str:
    """Record the end of a cell; return the line about it."""
    seconds = time.monotonic() - child.began
    reason = child.reason() if child.process.returncode else ""
    entry = log.ended(child.place, child.process.returncode, reason, seconds)
    text = f"{entry.status} after {span(seconds)}: {entry.reason or shares(entry.metrics)}"
    return f"[{child.place + 1}/{len(log.entries)}] {entry.key} {text}; {left} to go"


def stop(running: list[Running]) -> None:
    """Stop processes as SIGTERM does, and kill those that do not end in time."""
    for child in running:
        child.process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        while any(child.process.poll() is None for child in running):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
    except (KeyboardInterrupt, SystemExit):
        pass
    for child in running:
        child.process.kill()
        child.process.wait()


def log_of(folder: Path, config: Config) -> Path:
    """Name the file that a cell's lines go to."""
    return folder / "logs" / f"{config.name}-{config.fingerprint[:8]}.log"


def import_path() -> str:
    """Let the processes find the project as this one does, installed or not."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)
