"""Paths and URIs of MLflow's database, a move of the working directory, and state files."""

import ast
import shutil
from pathlib import Path

import pytest

from pipeline.tracking import resolve_uri
from pipeline.tracking.client import check_database, experiment_id, open_client
from pipeline.tracking.database_file import artifact_folder, to_path, to_uri
from pipeline.tracking.reasons import RefusedError, reason

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["plain", "My%20Project", "q?x", "50%", "a b#c&d=e+f;g@h:i é"])
def test_database_lies_in_the_working_directory_whatever_its_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / name
    home.mkdir()
    monkeypatch.chdir(home)
    uri = resolve_uri(None)
    assert to_path(uri) == home / "mlflow.db"
    assert resolve_uri(uri) == uri
    open_client(uri).search_experiments(max_results=1)
    assert [path.name for path in home.glob("*.db")] == ["mlflow.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_server_has_no_path() -> None:
    assert to_path("http://mlflow:5000") is None
    assert artifact_folder("postgresql://db/mlflow") is None


def test_artifacts_are_found_and_written_after_the_folder_has_moved(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "the%20re"
    here.mkdir()
    client = open_client(to_uri(here / "mlflow.db"))
    experiment = experiment_id(client, to_uri(here / "mlflow.db"), "e")
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "one", "note.txt")
    shutil.move(here, there)
    uri = to_uri(there / "mlflow.db")
    client = open_client(uri)
    assert Path(client.download_artifacts(run.info.run_id, "note.txt")).read_text() == "one"
    later = client.create_run(experiment_id(client, uri, "e"))
    client.log_text(later.info.run_id, "two", "note.txt")
    assert not here.exists()
    assert len(list(there.rglob("note.txt"))) == 2


def test_database_of_another_version_is_refused_with_what_helps(tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    good, uri = to_uri(tmp_path / "good.db"), to_uri(tmp_path / "mlflow.db")
    check_database(uri)  # none is there yet
    open_client(good).search_experiments(max_results=1)
    check_database(good)
    shutil.copy(tmp_path / "good.db", tmp_path / "mlflow.db")  # MLflow checks one once a process
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as base, base:
        base.execute("update alembic_version set version_num = '0000deadbeef'")
    with pytest.raises(RefusedError, match=r"mlflow db upgrade sqlite:///.*0000deadbeef"):
        check_database(uri)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("Can't locate revision identified by 'abc'", RefusedError, "another MLflow version"),
        ("API request failed with error code 401", RefusedError, "MLFLOW_TRACKING_USERNAME"),
        ("Caused by SSLError(certificate verify failed)", RefusedError, "certificate"),
        ("[Errno 111] Connection refused", ConnectionError, "is the server started?"),
        ("timed out", ConnectionError, "timed out"),
    ],
)
def test_four_troubles_are_four_messages(text: str, kind: type[Exception], words: str) -> None:
    found = reason(RuntimeError(f"{text} for http://me:hunter2@host"), "http://me:hunter2@host")
    assert isinstance(found, kind)
    assert words in str(found)
    assert "hunter2" not in str(found)
    assert "\n" not in str(found)


def test_paths_become_database_uris_in_one_place_alone() -> None:
    for file in (ROOT / "pipeline").rglob("*.py"):
        if file.name == "database_file.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                assert "sqlite:///{" not in ast.unparse(node), f"{file}: to_uri makes URIs"
