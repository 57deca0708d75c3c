"""Log of a grid's cells: on disk, and in the parent run in MLflow."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cli.arguments import PREEMPTED
from pipeline.config import Config
from pipeline.data.identity import check_data_of
from pipeline.grid.grid_request import GridRequest
from pipeline.storage.run_folder import run_folder
from pipeline.tracking import end_abandoned, send_rest
from pipeline.tracking.queries import GRID, PARENT
from pipeline.tracking.record_log import ChildRecord, RecordLog
from pipeline.tracking.state_file import RESULT, read_state


@dataclass(kw_only=True)
class CellRecord(ChildRecord):
    """One cell: ``waiting``, ``running``, ``finished``, ``failed`` or ``preempted``."""

    name: str
    seed: int
    fingerprint: str
    folder: str
    status: str = "waiting"

    @property
    def key(self) -> str:
        """Name of the cell and its seed."""
        return f"{self.name} seed {self.seed}"


class CellLog(RecordLog[CellRecord]):
    """Cells of a request, logged on disk and as tags of the parent run.

    The result of a cell is in its own run folder and MLflow run, so whatever the grid's process did
    not log before it died is read there again.
    """

    def __init__(self, request: GridRequest, *, strict: bool = False):
        super().__init__(request.folder, "cells.json")
        self.request = request
        self.entries = [
            CellRecord(
                name=config.name,
                seed=config.seed,
                fingerprint=config.fingerprint,
                folder=str(run_folder(config)),
            )
            for config in request.configs
        ]
        params = {"cells": str(len(self.entries))}
        self.open_parent(request.configs[0], params, {GRID: "parent"}, strict=strict)
        self._patience = self.tracker.patience  # for what finished cells left, all of them together

    def unfinished(self) -> list[int]:
        """Record the cells that are finished already; return the positions of the others."""
        left = []
        for place, config in enumerate(self.request.configs):
            if (result := result_of(config)) is None:
                left.append(place)
            else:
                self._adopt(config)
                self.write(place, "finished", result=result)
        return left

    def write(
        self,
        place: int,
        status: str,
        *,
        reason: str = "",
        seconds: float = 0.0,
        result: Mapping[str, Any] | None = None,
    ) -> CellRecord:
        """Log the status of a cell, on disk and in the parent run."""
        entry = self.entries[place]
        entry.status, entry.reason, entry.seconds = status, reason, seconds
        if result is not None:
            entry.run_id, entry.metrics = result["run_id"], dict(result["metrics"])
        self.tracker.handle({"kind": "tag", "key": f"cell/{entry.key}", "value": in_a_line(entry)})
        self.save([asdict(entry) for entry in self.entries])
        return entry

    def ended(self, place: int, code: int, reason: str, seconds: float) -> CellRecord:
        """Note the end of a cell's process; end its MLflow run if it could not do so itself."""
        config = self.request.configs[place]
        if code == 0 and (result := result_of(config)) is not None:
            self._adopt(config)
            return self.write(place, "finished", seconds=seconds, result=result)
        if code == PREEMPTED:  # by itself, with a checkpoint
            end_abandoned(run_folder(config), config.tracking_uri, "preempted")
            return self.write(place, "preempted", reason=reason)
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
        end_abandoned(run_folder(config), config.tracking_uri, "failed")
        return self.write(place, "failed", reason=reason or f"ended with code {code}")

    def stopped(self, place: int) -> None:
        """Note that a cell was stopped with the grid."""
        config = self.request.configs[place]
        if (result := result_of(config)) is not None:  # it was about to end
            self.write(place, "finished", result=result)
            return
        end_abandoned(run_folder(config), config.tracking_uri, "preempted", timeout=5.0)
        self.write(place, "preempted")

    def close(self, status: str) -> bool:
        """End the parent run; return whether MLflow has everything."""
        if self.path.exists():
            self.tracker.upload(self.folder, [self.path.name], timeout=5.0)
        return self.close_parent(status, "cells", ("finished", "failed"))

    def _adopt(self, config: Config) -> None:
        """Make a run a child of this grid, unless it is one of another; send what it still has."""
        parent = self.tracker.run_id
        began = time.monotonic()
        tags, wait = {PARENT: parent} if parent else {}, max(1.0, self._patience)
        if not send_rest(run_folder(config), config.tracking_uri, tags=tags, timeout=wait):
            self._patience -= time.monotonic() - began


def result_of(config: Config) -> dict[str, Any] | None:
    """Read the result of a finished run; None if there is none.

    Raises:
        OtherDataError: It was trained on other data than those that are there now.
    """
    found = read_state(run_folder(config) / "result.json", RESULT, print)
    if found is not None:
        what = f"cell {config.name}, seed {config.seed},"
        check_data_of(what, found.get("dataset_sha256"), config.dataset, print)
    return found


def in_a_line(entry: CellRecord) -> str:
    """Write the status of a cell in one line."""
    if entry.status == "failed":
        return f"failed: {entry.reason}"
    return f"{entry.status}{f': {shares(entry.metrics)}' if entry.metrics else ''}"


def shares(metrics: Mapping[str, float]) -> str:
    """Show the accuracies that matter."""
    robust = [n for n in metrics if n.startswith("test/ra_pgd") and n[11:].isdigit()]
    names = {"test/sa": "SA", **dict.fromkeys(robust[:1], "RA"), "test/ra_worst": "RA worst"}
    return ", ".join(f"{short} {metrics[n]:.1%}" for n, short in names.items() if n in metrics)
