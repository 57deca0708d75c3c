"""Outbox of a run: journal rows on disk, and the thread that sends them to the server.

The journal is a file of JSON lines and knows how far it was sent. Neither it nor the
thread knows which server that is.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROWS: dict[str, dict[str, type]] = {
    "metrics": {"time_ms": int, "step": int, "values": dict},
    "tag": {"time_ms": int, "key": str, "value": str},
    "status": {"time_ms": int, "value": str},
    "artifact": {"time_ms": int, "folder": str, "path": str},
    "model": {"time_ms": int, "path": str},
}
"""Fields of each kind of row."""


def replace_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


class Journal:
    """Append-only rows ``{"kind", "time_ms", ...}``, with a count of the bytes that were sent.

    Each row is one write, so a process killed at any byte leaves at most a torn last line, which
    is cut off on reopening. Nothing is synced: rows survive the process, not a power cut.
    Safe for one writer and one sender in threads of the same process.

    Attributes:
        tags: Last value of every tag that was ever noted.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._ack = folder / "journal.jsonl", folder / "journal.jsonl.ack"
        self.tags: dict[str, str] = {}
        self._last_step: dict[str, int] = {}
        self._lock = threading.Lock()
        self._size = self._recover()
        self._sent = self._read_ack()

    @property
    def drained(self) -> bool:
        """Whether everything was sent."""
        with self._lock:
            return self._sent >= self._size

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Note metrics, less those that are not finite or whose key already has this step.

        A resumed run repeats the steps since its checkpoint: the first one counts.
        """
        named = {name_for_server(key): float(value) for key, value in values.items()}
        with self._lock:
            fresh = {
                key: value
                for key, value in named.items()
                if math.isfinite(value) and step > self._last_step.get(key, step - 1)
            }
            if fresh:
                self._write({"kind": "metrics", "step": step, "values": fresh})

    def tag(self, key: str, value: str) -> None:
        """Note a tag, unless it already has this value."""
        key, value = name_for_server(key), value[:5000]  # a server takes 8000 bytes
        with self._lock:
            if self.tags.get(key) != value:
                self._write({"kind": "tag", "key": key, "value": value})

    def note(self, kind: str, **fields: str) -> None:
        """Note any other operation, always."""
        with self._lock:
            self._write({"kind": kind, **fields})

    def unsent(self, limit: int = 500) -> list[tuple[Row, int]]:
        """Return the next rows, each with the offset to acknowledge once it was sent."""
        with self._lock:
            end, rows = self._sent, []
        with self.path.open("rb") as file:
            file.seek(end)
            for line in islice(file, limit):
                if not line.endswith(b"\n"):  # still being written
                    break
                end += len(line)
                rows.append((parse(line), end))
        return rows

    def acknowledge(self, offset: int) -> None:
        """Remember that everything before ``offset`` was sent."""
        with self._lock:
            replace_file(self._ack, str(offset))
            self._sent = offset

    def _recover(self) -> int:
        self.path.touch()
        whole = 0
        with self.path.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self._remember(parse(line))
            file.truncate(whole)
        return whole

    def _read_ack(self) -> int:
        try:
            offset = int(self._ack.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0  # sending twice is harmless: the server drops equal points
        return offset if 0 <= offset <= self._size else 0

    def _write(self, row: Row) -> None:
        line = json.dumps({**row, "time_ms": time.time_ns() // 1_000_000}).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                file.truncate(self._size)  # half a row would spoil the next one
                raise OSError(f"no space left for {self.path}")
        self._size += len(line)
        self._remember(row)

    def _remember(self, row: Row) -> None:
        if row["kind"] == "metrics":
            self._last_step.update(dict.fromkeys(row["values"], row["step"]))
        elif row["kind"] == "tag":
            self.tags[row["key"]] = row["value"]


def parse(line: bytes) -> Row:
    """Read one row; what a failing disk left unreadable becomes a row that nobody acts on."""
    try:
        row = json.loads(line)
        whole = all(type(row[name]) is kind for name, kind in ROWS[row["kind"]].items())
        whole = whole and all(map(_is_number, row.get("values", {}).values()))
    except (ValueError, KeyError, TypeError):
        whole = False
    return row if whole else {"kind": "unreadable"}


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def name_for_server(key: str) -> str:
    """Replace what MLflow refuses in the name of a metric, parameter or tag."""
    parts = re.sub(r"[^\w\-./ :]", "_", key)[:250].split("/")
    return "/".join(part for part in parts if part not in {"", ".", ".."}) or "_"


class SenderThread(threading.Thread):
    """Daemon thread that sends a journal in order and, after an error, waits 1, 2, 4 ... 30 s.

    Args:
        deliver: Sends a leading part of the rows and returns how many; raises if it could not.
        report: Called with every error, in this thread.
    """

    def __init__(
        self,
        journal: Journal,
        deliver: Callable[[list[Row]], int],
        report: Callable[[Exception], None],
    ):
        super().__init__(name="tracking", daemon=True)
        self.journal, self._deliver, self._report = journal, deliver, report
        self.failures = 0  # in a row
        self._since = 0.0  # when the first of them began
        self._wake, self._hurry, self._over = (threading.Event() for _ in range(3))

    def run(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            began = time.monotonic()
            try:
                if not (rows := self.journal.unsent()):
                    self._wake.wait()
                    continue
                count = self._deliver([row for row, _ in rows])
                if count and not self._over.is_set():
                    self.journal.acknowledge(rows[count - 1][1])
                self.failures = 0
                self._hurry.wait(0.2 if count else 0)  # lets rows gather into one request
            except Exception as error:  # whatever it is, training goes on
                self._since = self._since if self.failures else began
                self.failures += 1
                self._report(error)
                pause = min(30.0, 2.0 ** min(self.failures - 1, 5))
                if self._hurry.wait(pause):
                    self._over.wait(1.0)

    @property
    def failing(self) -> float:
        """Seconds since the first of the failures in a row began; 0: there are none."""
        return time.monotonic() - self._since if self.failures else 0.0

    @property
    def over(self) -> bool:
        """Whether the thread is to stop, maybe in the middle of a request."""
        return self._over.is_set()

    def wake(self) -> None:
        """Say that there is something to send."""
        self._wake.set()

    def finish(self, timeout: float) -> bool:
        """Send for at most ``timeout`` seconds, then stop; return whether all was sent."""
        deadline = time.monotonic() + timeout
        self._hurry.set()
        self._wake.set()
        while not self.journal.drained and self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._over.set()
        self._wake.set()
        if self.is_alive():
            self.join(max(0.0, min(1.0, deadline - time.monotonic())))
        return self.journal.drained
