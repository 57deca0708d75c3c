"""A real MLflow server goes away and comes back; what it has then is counted."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.distributed.cluster import stoppable
from pipeline.grid import __main__ as grid
from pipeline.tracking import OutageError, Tracker, download, send_rest, strictly
from tests.helpers.servers import Mlflow, Postgres, Proxy, closed_port, points, wait_until

EXPERIMENT = "outages"
KEYS = ("val/ra", "val/sa")
WAIT = 3.0  # the bound in these tests
SLACK = 12.0  # for a machine with too much to do; no outage here is shorter


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_MOE_TRACKING_WAIT", str(WAIT))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    """A server that is not started, on either database; the tests of a module share it."""
    folder = tmp_path_factory.mktemp(request.param)
    postgres = Postgres(folder / "postgres") if request.param == "postgresql" else None
    database = postgres.start().uri if postgres else f"sqlite:///{folder}/server.db"
    mlflow = Mlflow(database, folder)
    yield mlflow
    mlflow.stop()
    if postgres:
        postgres.stop()


@pytest.fixture
def running(server: Mlflow) -> Mlflow:
    if server.process is None or server.process.poll() is not None:
        server.start()
    return server


def begin(folder: Path, uri: str, experiment: str = EXPERIMENT, **more: Any) -> Tracker:
    return Tracker.open(
        folder,
        tracking_uri=uri,
        experiment=experiment,
        name="a-run",
        params={"lr": "0.1"},
        tags={},
        **more,
    )


def tell(tracker: Tracker, steps: range) -> float:
    """Tell steps as the training does; return the longest time that one took."""
    slowest = 0.0
    for step in steps:
        began = time.monotonic()
        values = {key: step + place / 10 for place, key in enumerate(KEYS)}
        tracker.handle({"kind": "metrics", "step": step, "values": values})
        slowest = max(slowest, time.monotonic() - began)
    return slowest


def check_counted(uri: str, tracker: Tracker, count: int) -> None:
    """Every point once, in the order it was told, with its value; and one run."""
    from mlflow import MlflowClient

    for place, key in enumerate(KEYS):
        found = points(uri, tracker.run_id, key)
        assert [point.step for point in found] == list(range(count))
        assert [point.value for point in found] == [step + place / 10 for step in range(count)]
    run = MlflowClient(uri).get_run(tracker.run_id)
    runs = MlflowClient(uri).search_runs([run.info.experiment_id], max_results=100)
    assert [run.info.run_id for run in runs] == [tracker.run_id]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}


def test_server_away_at_the_start_in_the_middle_and_at_the_end_gets_everything_once(
    tmp_path: Path, server: Mlflow
) -> None:
    assert server.process is None
    began = time.monotonic()
    tracker = begin(tmp_path, server.uri)
    assert time.monotonic() - began < WAIT + SLACK
    assert tracker.run_id is None
    slowest = [tell(tracker, range(5))]
    uri = server.start()
    wait_until(lambda: tracker.journal.drained, 60)

    server.stop()
    slowest.append(tell(tracker, range(5, 10)))
    (tmp_path / "card.md").write_text("card")
    tracker.handle({"kind": "artifacts", "folder": str(tmp_path)})
    wait_until(lambda: bool(tracker.problem), 60)
    server.start()
    wait_until(lambda: tracker.journal.drained, 60)
    assert not tracker.problem

    server.freeze()
    try:
        slowest.append(tell(tracker, range(10, 15)))
        wait_until(lambda: tracker.away > 1.0, 60)
        slowest.append(tell(tracker, range(15, 20)))
        began = time.monotonic()
        assert not tracker.close("finished")
        assert WAIT / 2 < time.monotonic() - began < WAIT + SLACK
    finally:
        server.thaw()
    assert send_rest(tmp_path, uri, timeout=60)
    check_counted(uri, tracker, 20)
    assert max(slowest) < 1.0
    got = download(uri, str(tracker.run_id), "card.md", tmp_path / "got", EXPERIMENT)
    assert got.read_text() == "card"


def test_answers_of_500_and_answers_that_were_lost_double_nothing(
    tmp_path: Path, running: Mlflow
) -> None:
    """A run whose making was done but not answered is found again, and so are its points."""
    proxy = Proxy(running.uri)
    try:
        proxy.mode = "lost"
        tracker = begin(tmp_path, proxy.uri, "lost")
        assert tracker.run_id is None
        tell(tracker, range(5))
        wait_until(lambda: "500" in tracker.problem, 60)
        proxy.mode = "pass"
        wait_until(lambda: tracker.journal.drained, 60)
        for mode, steps in (("500", range(5, 10)), ("lost", range(10, 15))):
            proxy.mode, before = mode, len(proxy.seen)
            tell(tracker, steps)
            wait_until(lambda: bool(tracker.problem), 60)
            assert any("log-batch" in line for line in proxy.seen[before:])
            proxy.mode = "pass"
            wait_until(lambda: tracker.journal.drained, 60)
        assert tracker.close("finished", timeout=60)
        assert sum("runs/create" in line for line in proxy.seen) >= 1
        check_counted(running.uri, tracker, 15)
    finally:
        proxy.close()


def test_run_that_a_slow_server_made_twice_is_left_once(tmp_path: Path, running: Mlflow) -> None:
    from mlflow import MlflowClient

    tracker = begin(tmp_path, running.uri, "twins")
    wait_until(lambda: tracker.run_id is not None, 60)
    client = MlflowClient(running.uri)
    run = client.get_run(tracker.run_id)
    client.create_run(run.info.experiment_id, tags={"run_key": run.data.tags["run_key"]})
    tell(tracker, range(3))
    assert tracker.close("finished", timeout=60)
    check_counted(running.uri, tracker, 3)


def test_artifact_store_that_is_away_holds_up_no_metric_and_loses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = begin(tmp_path / "run", uri)

    def away(*_: object) -> None:
        raise OSError("the store is away")

    (tmp_path / "run" / "card.md").write_text("card")
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_artifact", away)
        tracker.handle({"kind": "artifacts", "folder": str(tmp_path / "run")})
        tell(tracker, range(3))
        wait_until(lambda: len(points(uri, tracker.run_id, KEYS[0])) == 3, 60)
        assert not tracker.journal.drained
    assert tracker.close("finished", timeout=60)
    got = download(uri, str(tracker.run_id), "card.md", tmp_path / "got", EXPERIMENT)
    assert got.read_text() == "card"


# Strict


def test_bound_is_a_number_of_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("ROBUST_MOE_TRACKING_WAIT", text)
        with pytest.raises(ValueError, match=f"ROBUST_MOE_TRACKING_WAIT must be .* '{text}'"):
            begin(tmp_path, "http://127.0.0.1:1")


def test_strict_run_does_not_begin_without_its_server(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(OutageError, match=r"MLflow at http://127\.0\.0\.1:\d+ is away \(.*refused"):
        begin(tmp_path, f"http://127.0.0.1:{closed_port()}", strict=True)
    assert WAIT / 2 < time.monotonic() - began < WAIT + SLACK, "a server may be about to start"


def test_strict_run_ends_when_its_server_is_away_for_longer_than_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    tracker = begin(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", strict=True)

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("nobody is there")

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", away)
        began = time.monotonic()
        tell(tracker, range(3))
        with (
            pytest.raises(OutageError, match="nobody is there"),
            stoppable(),
            strictly(tracker),
        ):
            threading.Event().wait(60)
        assert time.monotonic() - began > WAIT, "what is shorter than the bound is no outage"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert tracker.close("failed", timeout=60)
    assert [point.step for point in points(tracker._uri, tracker.run_id, KEYS[0])] == [0, 1, 2]


def test_stop_by_the_user_stays_one_in_a_strict_run(tmp_path: Path) -> None:
    tracker = begin(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", strict=True)
    with pytest.raises(KeyboardInterrupt), strictly(tracker):
        raise KeyboardInterrupt
    assert tracker.close("preempted")


@pytest.mark.parametrize("command", ["train", "grid"])
def test_strict_command_without_its_server_ends_with_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    words = ["dataset=synthetic", f"storage={tmp_path}/runs", f"tracking_uri={uri}"]
    run = train.run if command == "train" else grid.run
    if command == "grid":
        words += ["backbone=small", "algorithm=dense"]
    assert run([*words, "--strict-tracking"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: MLflow at {uri} is away")
    assert not list(tmp_path.rglob("checkpoints"))
