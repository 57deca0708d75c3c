"""Record log of a parent run: its children as JSON in a folder, and the parent's run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.config import Config
from pipeline.tracking.client import check_database, resolve_uri
from pipeline.tracking.open_run import commit
from pipeline.tracking.outbox import replace_file
from pipeline.tracking.state_file import read_state
from pipeline.tracking.tracker import Tracker


@dataclass(kw_only=True)
class ChildRecord:
    """One child: its status and the reason for it, and what its run has reached."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    run_id: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


R = TypeVar("R", bound=ChildRecord)
T = TypeVar("T")


class RecordLog(Generic[R]):
    """Children of a grid or a sweep; the process that owns the folder is its only writer.

    Attributes:
        entries: In the order of their numbers.
    """

    def __init__(self, folder: Path, file: str):
        self.folder, self.path = folder, folder / file
        self.entries: list[R] = []
        self._tracker: Tracker | None = None

    @property
    def tracker(self) -> Tracker:
        """The parent run."""
        assert self._tracker is not None
        return self._tracker

    def open_parent(
        self,
        config: Config,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        *,
        strict: bool = False,
    ) -> None:
        """Open or continue the parent run, where the children's config is tracked."""
        check_database(resolve_uri(config.tracking_uri))
        self._tracker = Tracker.open(
            self.folder,
            tracking_uri=config.tracking_uri,
            experiment=config.experiment,
            name=self.folder.name,
            params=params,
            tags={"commit": commit(), "run_folder": str(self.folder), **tags},
            strict=strict,
        )

    def save(self, content: Any) -> None:
        """Write the log's file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(content, indent=1) + "\n")

    def read(self, read: Callable[[Any], T]) -> T | None:
        """Read the log's file; None without one that can be used."""
        return read_state(self.path, say=print, read=read)

    def having(self, status: str) -> list[R]:
        """List the children with a status."""
        return [entry for entry in self.entries if entry.status == status]

    def close_parent(self, status: str, name: str, counted: Iterable[str]) -> bool:
        """End the parent run, with counts of its children; return whether MLflow has everything.

        Args:
            name: Of the children: the counts are the tags ``name_status``.
        """
        for kind in counted:
            count = str(len(self.having(kind)))
            self.tracker.handle({"kind": "tag", "key": f"{name}_{kind}", "value": count})
        return self.tracker.close(status)
