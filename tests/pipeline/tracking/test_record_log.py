"""The record log of a grid or a sweep: its file, and the tags of the parent run."""

from __future__ import annotations

from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

from mlflow import MlflowClient

from pipeline.config import Config
from pipeline.tracking.record_log import ChildRecord, RecordLog


def test_children_are_read_back_and_counted_on_the_parent_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log = RecordLog[ChildRecord](tmp_path / "parent", "children.json")
    read = itemgetter("children")
    assert log.read(read) is None
    log.entries = [ChildRecord(status=status) for status in ("finished", "failed", "finished")]
    log.open_parent(Config(tracking_uri=uri, experiment="e"), {"n": "3"}, {"grid": "parent"})
    log.save({"children": [asdict(entry) for entry in log.entries]})
    assert [ChildRecord(**entry) for entry in log.read(read)] == log.entries
    assert log.having("failed") == [log.entries[1]]
    assert log.close_parent("failed", "cells", ("finished", "failed"))
    run = MlflowClient(uri).get_run(log.tracker.run_id)
    assert {key: run.data.tags[key] for key in ("grid", "cells_finished", "cells_failed")} == {
        "grid": "parent",
        "cells_finished": "2",
        "cells_failed": "1",
    }
    assert run.info.status == "FAILED"
