"""State files that are empty, cut off, of another program, or none at all."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweep import trials
from pipeline.tracking.outbox import Journal, parse
from pipeline.tracking.state_file import RESULT, read_state
from pipeline.tracking.tracker import reopen
from pipeline.tune.trial_log import read_trials

GOOD = {"metrics": {"sa": 0.5}, "run_id": None, "ui": "mlflow ui"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        (json.dumps(GOOD)[:-4], "it is cut off or no JSON"),
        ("<html>", "it is cut off or no JSON"),
        (b"\xff\xfe\x00", "it is cut off or no JSON"),
        ("[]", "it holds a list"),
        ("5", "it holds a int"),
        ("null", "it holds a NoneType"),
        (json.dumps({"run_id": None, "ui": ""}), "it has no metrics"),
        (json.dumps({**GOOD, "metrics": 3}), "its metrics is 3"),
        (json.dumps({**GOOD, "run_id": [1]}), r"its run_id is \[1\]"),
    ],
)
def test_file_that_cannot_be_used_is_named_and_kept(tmp_path: Path, text: Any, why: str) -> None:
    file, said = tmp_path / "result.json", list[str]()
    content = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(content)
    assert read_state(file, RESULT, said.append) is None
    assert [f"cannot be used, {why.replace(chr(92), '')};" in line for line in said] == [True]
    assert not file.exists()
    assert (tmp_path / "result.json.damaged").read_bytes() == content


def test_good_file_is_read_and_one_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert read_state(file, RESULT) is None
    file.write_text(json.dumps(GOOD))
    assert read_state(file, RESULT) == GOOD
    assert read_state(file / "below", RESULT) is None


def test_folder_in_place_of_the_file_is_set_aside_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "run.json").mkdir()
        said = list[str]()
        assert read_state(tmp_path / "run.json", say=said.append) is None
        assert "it is a folder" in said[0]


def test_what_the_reader_raises_makes_the_file_damaged(tmp_path: Path) -> None:
    file, said = tmp_path / "trials.json", list[str]()
    for content in ({}, {"trials": [{"a": 1}], "reports": []}, {"trials": 1, "reports": [[1]]}):
        file.write_text(json.dumps(content))
        assert read_state(file, say=said.append, read=read_trials) is None
    assert len(said) == 3
    assert all("it is none of ours" in line for line in said)
    file.write_text(json.dumps({"a": 1}))
    assert read_state(file, read=itemgetter("a")) == 1


@pytest.mark.parametrize("text", ["[]", "5", "{}", '{"experiment": 3}', ""])
def test_run_json_of_another_program_was_never_tracked(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert reopen(tmp_path, f"sqlite:///{tmp_path}/mlflow.db") is None


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "metrics"},
        {"kind": "metrics", "time_ms": 1, "step": 2},
        {"kind": "metrics", "time_ms": 1, "step": 2, "values": {"loss": "low"}},
        {"kind": "metrics", "time_ms": 1, "step": True, "values": {}},
        {"kind": "tag", "time_ms": 1, "key": "a"},
        {"kind": "tag", "time_ms": 1, "key": "a", "value": 5},
        {"kind": "status", "value": "RUNNING"},
        {"kind": "artifact", "time_ms": 1, "path": "a"},
        {"kind": "model", "time_ms": 1},
        {"kind": "other", "time_ms": 1},
        {"kind": ["metrics"]},
        ["metrics"],
        None,
    ],
)
def test_row_without_its_fields_is_passed_over(tmp_path: Path, row: Any) -> None:
    assert parse(json.dumps(row).encode()) == {"kind": "unreadable"}
    good = {"kind": "metrics", "time_ms": 1, "step": 3, "values": {"loss": 0.5}}
    lines = [json.dumps(row), json.dumps(good)]
    (tmp_path / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert [found for found, _ in Journal(tmp_path).unsent()] == [{"kind": "unreadable"}, good]


@pytest.mark.parametrize("text", ["[]", "null", "7", "{", '{"keys": []}'])
def test_plan_of_a_sweep_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "sweep.json").write_text(text)
    monkeypatch.setattr(trials, "download", lambda *_: tmp_path / "sweep.json")
    with pytest.raises(ValueError, match=r"sweep\.json of run abc (is not|must be|lacks) .*"):
        trials.read_plan("", "abc", "e")
