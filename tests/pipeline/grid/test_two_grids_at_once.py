"""Whole commands against a real MLflow server: two grids at once on PostgreSQL, and outages."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint
from tests.helpers.servers import Mlflow, Postgres, points, wait_until

ROOT = Path(__file__).parents[3]
TINY = (
    "dataset=synthetic dataset.size=8 dataset.train_images=256 dataset.test_images=32 "
    "backbone.ratio=0.125 batch_size=32 evaluation.steps=2 evaluation.validation_steps=1 workers=1"
).split()


class Command(subprocess.Popen[str]):
    """A command of ours in a folder of its own, whose lines go to a file."""

    def __init__(self, home: Path, module: str, *words: str, **environment: str):
        home.mkdir(exist_ok=True)
        self.log = home / f"{module}.log"
        with self.log.open("a") as log:
            super().__init__(
                [sys.executable, "-u", "-m", module, *words],
                cwd=home,
                text=True,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            )

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    server = Postgres(tmp_path / "postgres")
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def mlflow(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mlflow]:
    """A running server, on PostgreSQL where the test has one."""
    on = "postgres" in request.fixturenames
    database = request.getfixturevalue("postgres").uri if on else f"sqlite:///{tmp_path}/server.db"
    server = Mlflow(database, tmp_path)
    server.start()
    yield server
    server.stop()


def emitted(folder: Path) -> Counter[tuple[str, int, float]]:
    """Every point that a run told its tracker, from the checkpoint's own history and the result."""
    found: Counter[tuple[str, int, float]] = Counter()
    newest, _ = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    meta = checkpoint.verify(newest)
    for row in meta["history"]:
        found.update((key, row["step"], value) for key, value in row["values"].items())
    final = json.loads((folder / "result.json").read_text())["metrics"]
    best = checkpoint.verify(folder / "checkpoints" / "best")["update"]
    found.update((key, best, value) for key, value in final.items())
    return found


def arrived(uri: str, run: Any) -> Counter[tuple[str, int, float]]:
    return Counter(
        (key, point.step, point.value)
        for key in run.data.metrics
        for point in points(uri, run.info.run_id, key)
    )


@pytest.mark.slow
def test_two_grids_at_once_on_postgresql_lose_and_double_no_metric(
    tmp_path: Path, postgres: Postgres, mlflow: Mlflow
) -> None:
    import psycopg
    from mlflow import MlflowClient

    shared = [*TINY, f"storage={tmp_path}/runs", f"tracking_uri={mlflow.uri}", "epochs=6"]
    shared += ["backbone=small", "seed=0,1", "at_once=1"]
    first = Command(tmp_path / "a", "pipeline.grid", *shared, "name=first", "algorithm=s_dense")
    second = Command(tmp_path / "b", "pipeline.grid", *shared, "name=second", "algorithm=moe_at")
    for command in (first, second):
        assert command.wait(timeout=560) == 0, command.said()

    folders = [path.parent for path in (tmp_path / "runs").rglob("result.json")]
    assert len(folders) == 4
    client, total = MlflowClient(mlflow.uri), 0
    for folder in folders:
        run = client.get_run(json.loads((folder / "run.json").read_text())["run_id"])
        assert run.info.status == "FINISHED"
        told = emitted(folder)
        assert len([point for point in told if point[0] == "val/ra"]) == 6
        assert arrived(mlflow.uri, run) == told
        total += told.total()
    with psycopg.connect(postgres.uri) as database:
        (stored,) = database.execute("select count(*) from metrics").fetchone() or (0,)
        (runs,) = database.execute("select count(*) from runs").fetchone() or (0,)
    assert stored == total
    assert runs == 6, "four cells and two parents"
    print(f"{total} points of {len(folders)} runs, {stored} in PostgreSQL")


@pytest.mark.slow
def test_server_that_dies_during_a_run_ends_it_if_it_is_strict_and_costs_nothing_if_not(
    tmp_path: Path, mlflow: Mlflow
) -> None:
    """Strict: one line and code 1, then the same command continues. Not: finished, sent later."""
    words = [*TINY, f"tracking_uri={mlflow.uri}", "epochs=60", "name=dying"]
    quick = {"ROBUST_MOE_TRACKING_WAIT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    strict = Command(tmp_path / "home", "pipeline.train", *words, "--strict-tracking", **quick)
    runs = tmp_path / "home" / "runs"
    wait_until(lambda: any(runs.rglob("step_*/meta.json")), 240)
    mlflow.stop()
    assert strict.wait(timeout=240) == 1, strict.said()
    errors = [line for line in strict.said().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"MLflow at {mlflow.uri} is away" in errors[0]
    assert "Traceback" not in strict.said()
    assert not list(runs.rglob("result.json"))

    lenient = Command(tmp_path / "home", "pipeline.train", *words, **quick)
    try:
        assert lenient.wait(timeout=400) == 0, lenient.said()
    finally:
        if lenient.poll() is None:
            lenient.send_signal(signal.SIGTERM)
    assert "MLflow does not have everything yet" in lenient.said()
    mlflow.start()
    again = Command(tmp_path / "home", "pipeline.train", *words)
    assert again.wait(timeout=240) == 0, again.said()

    from mlflow import MlflowClient

    (folder,) = [path.parent for path in runs.rglob("result.json")]
    run = MlflowClient(mlflow.uri).get_run(json.loads((folder / "run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert arrived(mlflow.uri, run) == emitted(folder)
    assert len(MlflowClient(mlflow.uri).search_runs([run.info.experiment_id])) == 1
    assert run.outputs.model_outputs, "the model as well"
