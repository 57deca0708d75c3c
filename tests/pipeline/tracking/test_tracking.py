"""Nothing told to the tracker is lost or told twice, whatever happens to driver and server."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.tracking import Tracker, download, resolve_uri, send_rest, without_password
from pipeline.tracking.outbox import Journal
from tests.helpers.servers import closed_port, wait_until

EXPERIMENT = "tracking-test"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking database whose tables exist: building them takes seconds."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('server')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def begin(folder: Path, uri: str, **params: str) -> Tracker:
    return Tracker.open(
        folder,
        tracking_uri=uri,
        experiment=EXPERIMENT,
        name="a-run",
        params=params or {"lr": "0.1"},
        tags={"commit": "abc"},
    )


def tell(tracker: Tracker, *steps: int, key: str = "val/ra") -> None:
    for step in steps:
        tracker.handle({"kind": "metrics", "step": step, "values": {key: step / 10}})


def told(uri: str, run_id: str | None, key: str = "val/ra") -> list[int]:
    """Steps of a metric as the server has them, in order."""
    from mlflow import MlflowClient

    return sorted(point.step for point in MlflowClient(uri).get_metric_history(run_id, key))


def run_of(uri: str, tracker: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri).get_run(tracker.run_id)


def model_uri(uri: str, tracker: Tracker) -> str:
    """The one logged model of a run."""
    from mlflow import MlflowClient

    run = run_of(uri, tracker)
    (output,) = run.outputs.model_outputs
    record = MlflowClient(uri).get_logged_model(output.model_id)
    assert record.status == "READY"
    assert record.source_run_id == tracker.run_id
    return str(record.model_uri)


# The journal


def test_journal_drops_a_torn_last_line_at_any_byte(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "whole")
    for step in range(3):
        journal.append(step, {"loss": float(step)})
    whole = journal.path.read_bytes()
    for size in range(len(whole)):
        torn = tmp_path / str(size) / "journal.jsonl"
        torn.parent.mkdir()
        torn.write_bytes(whole[:size])
        again = Journal(torn.parent)
        for step in range(3):  # the resumed run repeats its steps
            again.append(step, {"loss": float(step)})
        assert [row["step"] for row, _ in again.unsent()] == [0, 1, 2]


def test_journal_survives_a_killed_writer(tmp_path: Path) -> None:
    code = (
        "import itertools, sys; from pathlib import Path\n"
        "from pipeline.tracking.outbox import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for step in itertools.count(): journal.append(step, {'loss': 1.0})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        path = tmp_path / "journal.jsonl"
        wait_until(lambda: path.exists() and path.stat().st_size > 10_000, 30)
    finally:
        writer.kill()
        writer.wait()
    rows = [row for row, _ in Journal(tmp_path).unsent(limit=1_000_000)]
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_journal_skips_only_the_keys_that_already_have_the_step(tmp_path: Path) -> None:
    Journal(tmp_path).append(5, {"a": 1.0})
    again = Journal(tmp_path)
    again.append(5, {"a": 2.0, "b": 3.0})
    again.append(4, {"a": 4.0})
    assert [row["values"] for row, _ in again.unsent()] == [{"a": 1.0}, {"b": 3.0}]


def test_journal_keeps_out_what_is_not_finite(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    journal.append(2, {"a": math.nan})
    assert [row["values"] for row, _ in journal.unsent()] == [{"c": 1.0}]


def test_journal_remembers_across_openings_what_was_sent(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(4):
        journal.append(step, {"a": 0.0})
    journal.acknowledge(journal.unsent()[1][1])
    assert [row["step"] for row, _ in Journal(tmp_path).unsent()] == [2, 3]


@pytest.mark.parametrize("damage", ["", "many", "-3", "999999"])
def test_journal_with_a_damaged_mark_sends_all_again(tmp_path: Path, damage: str) -> None:
    Journal(tmp_path).append(1, {"a": 0.0})
    (tmp_path / "journal.jsonl.ack").write_text(damage)
    assert len(Journal(tmp_path).unsent()) == 1


def test_journal_steps_over_a_row_that_the_disk_damaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(1, {"a": 0.0})
    with journal.path.open("ab") as file:
        file.write(b"\0\0\0\n")
    again = Journal(tmp_path)
    again.append(2, {"a": 0.0})
    assert [row.get("step") for row, _ in again.unsent()] == [1, None, 2]


# The run


def test_metrics_arrive_at_their_steps_in_less_than_a_second(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, database)
    tell(tracker, 1, 2, 7)
    wait_until(lambda: told(database, tracker.run_id) == [1, 2, 7], 1.0)
    assert tracker.close("finished")


def test_more_than_one_batch_arrives_whole(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, database)
    tracker.handle(
        {"kind": "metrics", "step": 1, "values": {f"route/load_{e}": 0.5 for e in range(1100)}}
    )
    tell(tracker, *range(1200))
    assert tracker.close("finished")
    assert told(database, tracker.run_id) == list(range(1200))
    assert len(run_of(database, tracker).data.metrics) == 1101


def test_resumed_run_continues_with_no_step_doubled(tmp_path: Path, database: str) -> None:
    first = begin(tmp_path, database)
    tell(first, 1, 2, 3)
    first.close("preempted")
    second = begin(tmp_path, database)
    tell(second, 2, 3, 4)
    wait_until(lambda: run_of(database, second).info.status == "RUNNING", 5)
    second.close("finished")
    assert second.run_id == first.run_id
    assert told(database, second.run_id) == [1, 2, 3, 4]


def test_driver_killed_before_its_mark_was_written_doubles_nothing(
    tmp_path: Path, database: str
) -> None:
    first = begin(tmp_path, database)
    tell(first, 1, 2, 3)
    first.close("preempted")
    (tmp_path / "journal.jsonl.ack").unlink()
    begin(tmp_path, database).close("finished")
    assert told(database, first.run_id) == [1, 2, 3]


def test_driver_killed_before_it_noted_the_run_id_finds_its_run(
    tmp_path: Path, database: str
) -> None:
    first = begin(tmp_path, database)
    first.close("preempted")
    info = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**info, "run_id": None}))
    second = begin(tmp_path, database)
    second.close("finished")
    assert second.run_id == first.run_id


@pytest.mark.parametrize(
    ("status", "in_mlflow"),
    [("finished", "FINISHED"), ("failed", "FAILED"), ("preempted", "KILLED")],
)
def test_outcome_is_the_status_of_the_run(
    tmp_path: Path, database: str, status: str, in_mlflow: str
) -> None:
    tracker = begin(tmp_path, database)
    assert tracker.close(status)
    run = run_of(database, tracker)
    assert (run.info.status, run.data.tags["status"]) == (in_mlflow, status)
    assert run.info.end_time >= run.info.start_time


def test_unknown_outcome_is_refused(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, database)
    with pytest.raises(ValueError, match=r"finished, failed, preempted, .*, got 'done'"):
        tracker.close("done")
    tracker.close("failed")


def test_parameters_stay_as_they_were_when_the_run_began(tmp_path: Path, database: str) -> None:
    many = {f"p.{number}": str(number) for number in range(150)}
    begin(tmp_path, database, lr="0.1", **many).close("preempted")
    again = begin(tmp_path, database, lr="0.2", new="1")
    assert again.close("finished")
    assert run_of(database, again).data.params == {"lr": "0.1", **many}


def test_tags_change_and_warnings_gather_once_each(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, database)
    tracker.handle({"kind": "tag", "key": "workers", "value": "2"})
    for text in ("slow", "loss is nan", "slow"):
        tracker.handle({"kind": "warning", "text": text})
    tracker.handle({"kind": "tag", "key": "workers", "value": "1"})
    tracker.handle({"kind": "progress", "epoch": 1})
    tracker.close("finished")
    tags = run_of(database, tracker).data.tags
    assert (tags["workers"], tags["warnings"]) == ("1", "slow\nloss is nan")
    assert tags["commit"] == "abc"


def test_names_that_mlflow_refuses_are_mended(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, database, **{"a[0]": "x" * 7000})
    tell(tracker, 1, key="../load//ra@50")
    assert tracker.close("finished")
    assert told(database, tracker.run_id, "load/ra_50") == [1]


def test_what_the_server_refuses_does_not_hold_up_the_rest(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.tracking.outbox.name_for_server", lambda key: key)
    tracker = begin(tmp_path, database)
    tell(tracker, 1, 2)
    tell(tracker, 3, key="bad@name")
    tell(tracker, 4)
    assert tracker.close("finished")
    assert told(database, tracker.run_id) == [1, 2, 4]
    assert "bad@name" in caplog.text


def test_run_deleted_on_the_server_is_told_anew(tmp_path: Path, database: str) -> None:
    from mlflow import MlflowClient

    tracker = begin(tmp_path, database)
    tell(tracker, 1)
    wait_until(lambda: tracker.journal.drained, 5)
    deleted = tracker.run_id
    MlflowClient(database).delete_run(deleted)
    tell(tracker, 2)
    assert tracker.close("finished")
    assert tracker.run_id != deleted
    assert told(database, tracker.run_id) == [1, 2]


def test_uploads_keep_their_place(tmp_path: Path, database: str) -> None:
    from mlflow import MlflowClient

    for name in ("card.md", "plots/curve.png", "checkpoints/best/meta.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    tracker = begin(tmp_path, database)
    missing = tracker.upload(tmp_path, ["card.md", "plots", "checkpoints/best", "no.txt"])
    assert missing == ["no.txt"]
    tracker.close("finished")
    client = MlflowClient(database)
    folders = (None, "plots", "checkpoints/best")
    found = [file.path for at in folders for file in client.list_artifacts(tracker.run_id, at)]
    assert set(found) >= {"card.md", "plots/curve.png", "checkpoints/best/meta.json"}


def test_artifacts_event_uploads_what_the_run_folder_has(tmp_path: Path, database: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    tracker = begin(tmp_path, database)
    tracker.handle({"kind": "artifacts", "folder": str(tmp_path)})
    assert tracker.close("finished")
    got = download(database, str(tracker.run_id), "config.json", tmp_path / "got", EXPERIMENT)
    assert got.read_text() == "{}"


def test_logged_model_gives_equal_logits_for_another_batch_size(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten()).eval()
    tracker = begin(tmp_path, database)
    assert tracker.log_model(model, torch.rand(2, 3, 4, 4).numpy())
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert run_of(database, tracker).info.status == "RUNNING"
    assert tracker.close("finished")
    uri = model_uri(database, tracker)
    try:
        mlflow.set_tracking_uri(database)
        loaded = mlflow.pytorch.load_model(uri)
        signature = mlflow.models.get_model_info(uri).signature
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    x_BCHW = torch.rand(5, 3, 4, 4)
    torch.testing.assert_close(loaded(x_BCHW), model(x_BCHW))
    assert signature.inputs.inputs[0].shape == (-1, 3, 4, 4)


def test_model_that_cannot_be_traced_does_not_fail_the_run(tmp_path: Path, database: str) -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    tracker = begin(tmp_path, database)
    assert not tracker.log_model(Branching(), torch.rand(2, 3, 4, 4).numpy())
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        tracker.log_model(Branching(), torch.rand(1, 3, 4, 4).numpy())
    assert tracker.close("finished")


# The server away


@pytest.mark.usefixtures("impatient")
def test_absent_server_costs_no_time_and_another_gets_everything(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    away = f"http://someone:s3cret@127.0.0.1:{closed_port()}"
    (tmp_path / "card.md").write_text("card")
    start = time.monotonic()
    tracker = begin(tmp_path, away)
    assert time.monotonic() - start < 10
    start = time.monotonic()
    tell(tracker, *range(200))
    assert time.monotonic() - start < 1
    start = time.monotonic()
    assert tracker.upload(tmp_path, ["card.md"]) == ["card.md"]
    assert tracker.log_model(torch.nn.Flatten().eval(), torch.rand(2, 3, 4, 4).numpy())
    assert not tracker.close("finished", timeout=1.0)
    assert time.monotonic() - start < 4
    assert tracker.run_id is None
    assert "metrics wait in" in caplog.text
    assert "Connection refused" in tracker.problem
    for text in (caplog.text, (tmp_path / "run.json").read_text(), tracker.ui_hint()):
        assert "s3cret" not in text

    back = begin(tmp_path, database)
    tell(back, *range(198, 203))
    assert back.close("finished")
    assert told(database, back.run_id) == list(range(203))
    assert download(database, str(back.run_id), "card.md", tmp_path / "got", EXPERIMENT).exists()
    assert model_uri(database, back), "the model as well"


@pytest.mark.usefixtures("impatient")
def test_rest_of_a_finished_run_is_sent_later(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, f"http://127.0.0.1:{closed_port()}")
    tell(tracker, 1, 2)
    assert not tracker.close("failed", timeout=0.5)
    assert send_rest(tmp_path, database)
    run_id = json.loads((tmp_path / "run.json").read_text())["run_id"]
    assert told(database, run_id) == [1, 2]
    assert send_rest(tmp_path, database)
    assert send_rest(tmp_path / "never", database)


@pytest.mark.usefixtures("impatient")
def test_server_that_never_answers_holds_up_neither_open_nor_close(tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        start = time.monotonic()
        tracker = begin(tmp_path, f"http://127.0.0.1:{mute.getsockname()[1]}")
        tell(tracker, 1)
        assert not tracker.close("finished", timeout=1.0)
        assert time.monotonic() - start < 8  # one request of 2 s, maybe a second one


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("code", [400, 403, 404, 500])
def test_proxy_without_its_server_loses_nothing(tmp_path: Path, database: str, code: int) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(code)

        do_POST = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        tracker = begin(tmp_path, f"http://127.0.0.1:{proxy.server_port}")
        tell(tracker, 1)
        assert str(code) in tracker.problem
        assert not tracker.close("finished", timeout=0.5)
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert send_rest(tmp_path, database)
    run_id = json.loads((tmp_path / "run.json").read_text())["run_id"]
    assert told(database, run_id) == [1]


@pytest.mark.usefixtures("impatient")
def test_known_run_stays_known_while_a_proxy_answers_not_found(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """404 must not look like a deleted run: nothing is made again unless the server can make it."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    tracker = begin(tmp_path, database)
    run_id = tracker.run_id
    wait_until(lambda: tracker.journal.drained, 5)

    def not_found(*_: object, **__: object) -> None:
        raise MlflowException("404", error_code=5)  # RESOURCE_DOES_NOT_EXIST

    with monkeypatch.context() as broken:
        for name in ("log_batch", "get_run", "create_experiment", "create_run", "search_runs"):
            broken.setattr(MlflowClient, name, not_found)
        tell(tracker, 1)
        wait_until(lambda: bool(tracker.problem), 5)
    assert tracker.close("finished")
    assert tracker.run_id == run_id
    assert told(database, run_id) == [1]


# Addresses and downloads


def test_default_is_a_database_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000/")
    assert resolve_uri("") == "http://localhost:5000"
    assert resolve_uri("sqlite:////data/m.db") == "sqlite:////data/m.db"
    with pytest.raises(ValueError, match=r"tracking_uri must be .* got 'mlruns'"):
        resolve_uri("mlruns")


@pytest.mark.parametrize(
    ("uri", "bare"),
    [
        ("https://me:p@ss@host:5000/a", "https://host:5000/a"),
        ("postgresql://me:x@db/mlflow?sslmode=on", "postgresql://db/mlflow?sslmode=on"),
        ("postgresql://db/mlflow?password=x", "postgresql://db/mlflow?password=..."),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_shown_addresses_have_no_password(uri: str, bare: str) -> None:
    assert without_password(uri) == bare


def test_hint_is_short_in_the_working_directory(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = begin(tmp_path, database)
    tracker.close("finished")
    folder = Path(database.removeprefix("sqlite:///")).parent
    assert tracker.ui_hint() == f"mlflow ui --backend-store-uri {database}"
    monkeypatch.chdir(folder)
    assert tracker.ui_hint() == "mlflow ui --backend-store-uri sqlite:///mlflow.db"


def test_latest_is_the_run_that_finished_last(tmp_path: Path, database: str) -> None:
    (tmp_path / "card.md").write_text("old")
    for name, status in (("old", "finished"), ("new", "finished"), ("bad", "failed")):
        (tmp_path / "card.md").write_text(name)
        tracker = begin(tmp_path / name, database)
        tracker.upload(tmp_path, ["card.md"])
        tracker.close(status)
    got = download(database, "latest", "card.md", tmp_path / "got", EXPERIMENT)
    assert got.read_text() == "new"


def test_download_says_what_is_not_there(tmp_path: Path, database: str) -> None:
    tracker = begin(tmp_path, database)
    tracker.close("finished")
    run_id = str(tracker.run_id)
    with pytest.raises(ValueError, match=f"no run 'x y' in experiment .* the newest: .*{run_id}"):
        download(database, "x y", "card.md", tmp_path, EXPERIMENT)
    with pytest.raises(ValueError, match=f"run {run_id} has no artifact 'a/b', only nothing"):
        download(database, run_id, "a/b", tmp_path, EXPERIMENT)
    with pytest.raises(ValueError, match="no experiment 'other'"):
        download(database, "latest", "card.md", tmp_path, "other")
    with pytest.raises(ValueError, match="no tracking database"):
        download(f"sqlite:///{tmp_path}/none.db", "latest", "card.md", tmp_path, EXPERIMENT)


@pytest.mark.usefixtures("impatient")
def test_download_from_an_absent_server_is_a_connection_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"MLflow at http://127\.0\.0\.1"):
        download(f"http://127.0.0.1:{closed_port()}", "latest", "a", tmp_path, EXPERIMENT)


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Other processes


OPEN_AND_CLOSE = """
import sys
from pathlib import Path
from pipeline.tracking import Tracker
tracker = Tracker.open(Path(sys.argv[1]), tracking_uri=sys.argv[2], experiment="e", name="n",
                       params={}, tags={})
sys.exit(0 if tracker.run_id and tracker.close("finished", timeout=60) else 1)
"""


def test_first_use_by_three_processes_at_once_is_quiet_and_works(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_CLOSE, str(tmp_path / name), uri],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name in "abc"
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0]
    assert said == [b"", b"", b""]
