"""The grid as a user runs it: its cells and costs, a failing cell, a killed driver, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.cost import cost
from pipeline.checkpoint import build_model
from pipeline.config import Config
from pipeline.config.overrides import flatten
from pipeline.grid import scheduler
from pipeline.grid.__main__ import run as grid
from pipeline.grid.cell_log import CellRecord
from pipeline.grid.grid_request import read_request
from pipeline.presets import PRESETS, headline, label
from pipeline.presets.paper_grid import RADII, ROWS, Row, cell, cells, costs, held, offered
from pipeline.storage.run_folder import check_lasting, owned
from pipeline.tracking import Tracker, end_abandoned, send_rest

ROOT = Path(__file__).parents[3]
TINY = (
    "backbone=small backbone.ratio=0.125 dataset.size=8 dataset.train_images=256 "
    "dataset.test_images=32 batch_size=32 evaluation.steps=2 evaluation.validation_steps=1 "
    "precision=fp32"
).split()
MISSING = "dataset=synthetic,cifar10"  # the second has no folder in the test's directory
CELLS = [pytest.param(cell, id=cell.name) for cell in cells()]


# The presets of the grid


@pytest.mark.parametrize("preset", CELLS)
def test_every_cell_is_a_preset_with_the_settings_that_its_row_asks_for(preset: Any) -> None:
    config, row = PRESETS[preset.name](), ROWS[preset.algorithm]
    flat = flatten(config)
    assert config.name == preset.name
    assert (flat["dataset"], flat["backbone"]) == (preset.dataset, preset.backbone)
    assert flat["algorithm"] == row.algorithm
    assert (config.backbone.num_experts > 1) == row.mixture
    if row.same_cost:
        mixture = cell(preset.backbone, preset.dataset, "adv_moe")
        size, classes = config.dataset.image_size, config.dataset.num_classes
        with torch.device("meta"):
            own, want = (cost(c.backbone.build(classes, size), size) for c in (config, mixture))
        coarse = preset.backbone == "densenet"  # its growth rate is a small whole number
        assert own.gmac == pytest.approx(want.gmac, rel=0.16 if coarse else 0.02)
    else:
        assert config.backbone.ratio == (0.5 if row.narrow else 1.0)
    radius = RADII.get(preset.dataset, 8.0)
    assert flat["algorithm.attack.eps"] == flat["evaluation.eps"] == radius / 255
    assert flat["algorithm.attack.steps"] == 2
    assert headline(preset.name).startswith(row.title)


def test_presets_of_the_grid_equal_those_that_were_written_by_hand() -> None:
    for backbone in ("resnet18", "small"):
        name = f"adv_moe_cifar10_{backbone}"
        assert cell(backbone, "cifar10", "adv_moe") == PRESETS[name]()


def test_rows_of_a_cell_share_everything_but_their_form() -> None:
    """Else a difference between them would not be the algorithm's."""
    own = flatten(cell("resnet18", "cifar10", "adv_moe"))
    for name in ROWS:
        if not any(known.algorithm == name for known in cells()):
            continue
        other = flatten(cell("resnet18", "cifar10", name))
        apart = {key for key in own.keys() & other.keys() if own[key] != other[key]}
        assert apart <= {"algorithm", "backbone.num_experts", "backbone.ratio", "name"}


def test_label_says_the_command_the_settings_and_the_cost_that_is_counted() -> None:
    text = " ".join(label("moe_at_cifar10_resnet18").split())
    assert "python -m pipeline.train moe_at_cifar10_resnet18" in text
    assert "2 steps of 5/255 within 8/255" in text
    assert "0.1923 GMAC, 0.0406 of them the router's, 0.346 of the dense net's" in text


def test_unknown_cells_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="no backbone 'mobilenet'; nearest: "):
        cell("mobilenet", "cifar10", "adv_moe")
    with pytest.raises(ValueError, match="no algorithm 'trades'; nearest: "):
        cell("small", "cifar10", "trades")
    with pytest.raises(ValueError, match=r"backbone\.ratio must be above 0"):
        cell("small", "cifar10", "s_dense", ratio=0.0)
    with pytest.raises(ValueError, match=r"backbone\.num_experts must be 1"):
        cell("lipschitz", "cifar10", "adv_moe")
    with pytest.raises(ValueError, match=r"backbone=dual has num_experts 16, and no form with 1"):
        cell("dual", "cifar10", "dense")


def test_row_of_the_tables_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cell, preset, label and cost follow from the line; for its plot see the report's test."""
    row = Row("Plain PGD", "pgd_training", False, False, "cross-entropy", "arXiv:1706.06083")
    monkeypatch.setitem(ROWS, "plain", row)
    assert flatten(cell("small", "digits", "plain"))["algorithm"] == "pgd_training"
    assert read_request({"algorithm": "plain", "dataset": "digits", "backbone": "small"}).configs
    (found, *_) = [each for each in cells() if each.algorithm == "plain"]
    assert "Plain PGD on CIFAR-10 with ResNet-18" in found.label()
    assert "Training: about" in found.label()


# The request


def test_default_is_adv_moe_on_all_that_the_paper_has() -> None:
    found = {(c.name, c.seed) for c in read_request({}).configs}
    pairs = [(b, d) for b in offered("backbone") for d in offered("dataset")]
    assert found == {(f"adv_moe_{dataset}_{backbone}", 0) for backbone, dataset in pairs}


def test_settings_reach_the_cells_that_have_them() -> None:
    given = {"backbone": "small", "dataset": "digits", "algorithm": "dense,s_dense,adv_moe"}
    request = read_request(
        given | {"seed": "0,1", "epochs": "3", "algorithm.alpha": "2", "backbone.ratio": "0.25"}
    )
    assert len(request.configs) == 6
    assert {config.epochs for config in request.configs} == {3}
    assert {config.seed for config in request.configs} == {0, 1}
    assert [config.backbone.ratio for config in request.configs] == [1, 1, 0.25, 0.25, 0.25, 0.25]
    assert flatten(request.configs[-1])["algorithm.alpha"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("backbone=smalll", "no backbone 'smalll'; nearest: small"),
        ("algorithm=dense,dense", "algorithm names one twice: dense,dense"),
        ("wrong=1", "no key 'wrong'; nearest: "),
        (
            "algorithm=dense algorithm.router_loss=trades",
            "no key 'algorithm.router_loss'; ",
        ),
        ("algorithm=dense backbone.ratio=0.5", r"backbone\.ratio changes none of dense"),
        ("algorithm=s_dense backbone.num_experts=4", "num_experts changes none of s_dense"),
        ("seed=0,x", "seed must be a whole number, got 'x'"),
        ("at_once=0", "at_once must be at least 1, got 0"),
        ("batch_size=33 workers=2", r"batch_size must be a multiple of workers \(2\), got 33"),
        ("name=../escape", "name must be a plain name without"),
        ("wrong", r"at most 0 name\(s\), got wrong"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(words.split())


def test_same_request_has_the_same_folder_in_whatever_order_it_is_written() -> None:
    one = read_request({"backbone": "small,resnet18", "dataset": "cifar10"})
    two = read_request({"dataset": "cifar10", "backbone": "resnet18,small", "at_once": "2"})
    assert one.folder == two.folder
    assert one.folder != read_request({"backbone": "small", "dataset": "cifar10"}).folder


def test_dry_run_counts_each_cell_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "backbone=small dataset=cifar10 algorithm=dense,adv_moe seed=0,1 --dry-run"
    assert grid(words.split()) == 0
    head, dense, mixture, foot = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["cell", "px", "GMAC"]
    config = cell("small", "cifar10", "adv_moe")
    own, full = cost(build_model(config), 32), costs(config)[1]
    name, size, gmac, router, params, unit, top, ratio = mixture.split()
    assert (name, size, unit) == ("adv_moe_cifar10_small", "32", "M")
    assert float(gmac) == pytest.approx(own.gmac, abs=1e-4)
    assert float(router) == pytest.approx(own.gmac_router, abs=1e-4)
    assert float(params) == pytest.approx(own.params / 1e6, abs=1e-3)
    assert float(ratio) == pytest.approx(own.gmac / full.gmac, abs=1e-3)
    assert dense.split()[-2:] == [top, "1.000"]
    assert foot == "4 runs; seeds 0, 1"
    assert not list(tmp_path.iterdir())


# Where runs are kept


def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be the driver of ``ray job submit --working-dir .``."""
    environment = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(environment))


def test_job_is_told_all_that_would_be_lost_with_its_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job(monkeypatch)
    wanted = r"storage=/shared/runs, MLFLOW_TRACKING_URI=.*, ROBUST_MOE_DATA=/shared/data"
    with pytest.raises(ValueError, match=wanted):
        check_lasting(cell("small", "cifar10", "dense"))
    monkeypatch.setenv("ROBUST_MOE_DATA", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    check_lasting(Config(storage=str(tmp_path)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ValueError, match=r"places that last: MLFLOW_TRACKING_URI=[^,]*$"):
        check_lasting(Config(storage=str(tmp_path)))


def test_outside_a_job_places_below_the_working_directory_are_fine() -> None:
    check_lasting(cell("small", "cifar10", "dense"))


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    said: list[str] = []
    with owned(tmp_path / "run", said.append) as free:
        assert free
        with owned(tmp_path / "run", said.append, patience=0.0) as second:
            assert not second
    assert len(said) == 1
    with owned(tmp_path / "run", said.append, patience=0.0) as free:
        assert free


# Runs


class Command:
    """``python -m pipeline.grid`` in a working directory of its own, told in lines."""

    def __init__(self, home: Path):
        self.home, self.log = home, home / "out.txt"
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "ROBUST_MOE_DATA"):
            self.env.pop(name, None)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as file:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pipeline.grid", *TINY, *words],
                    cwd=self.home,
                    env=self.env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
        return self.started[-1]

    def run(self, *words: str) -> tuple[int, str]:
        code = self.start(*words).wait(timeout=400)
        return code, self.log.read_text()

    def checkpoints(self, name: str) -> int:
        runs = self.home / "runs" / "robust-moe"
        return len(list(runs.glob(f"{name}-????????/checkpoints/step_*")))

    def runs(self) -> dict[str, tuple[str, dict[str, str], list[int]]]:
        """Status, tags and epochs' steps of every MLflow run, by name; the grid's as ``grid``."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.home}/mlflow.db")
        experiment = client.get_experiment_by_name("robust-moe")
        assert experiment is not None
        found = {}
        for run in client.search_runs([experiment.experiment_id]):
            name = re.sub(r"^grid-.*", "grid", run.info.run_name)
            assert name not in found, "a cell has two runs"
            history = client.get_metric_history(run.info.run_id, "val/ra")
            tags = run.data.tags | {"id": run.info.run_id}
            found[name] = (run.info.status, tags, [metric.step for metric in history])
        return found


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=90)


def wait_for(condition: Callable[[], bool], command: Command) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert command.started[-1].poll() is None, command.log.read_text()
        assert time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.1)


def test_killed_driver_and_the_same_command_finish_the_rest(command: Command) -> None:
    """Of four cells one is finished, two lack their data, and one is killed in the middle."""
    words = [MISSING, "algorithm=s_dense,moe_at", "epochs=3", "at_once=1"]
    driver = command.start(*words)
    wait_for(lambda: command.checkpoints("moe_at_synthetic_small") > 0, command)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = command.log.read_text()
    assert "[1/4] s_dense_synthetic_small seed 0 finished" in before
    assert "[2/4] s_dense_cifar10_small seed 0 failed" in before
    (result,) = (command.home / "runs" / "robust-moe").glob("s_dense_*/result.json")
    written = result.stat().st_mtime_ns

    code, out = command.run(*words)
    assert code == 1, out
    assert "4 cells, 1 finished before" in out
    assert "s_dense_synthetic_small seed 0 started" not in out
    assert "[3/4] moe_at_synthetic_small seed 0 finished" in out
    assert out.count("cifar10 does not exist") == 4  # as they failed, and in the list at the end
    assert "error: 2 of 4 cells failed" in out.splitlines()[-1]
    assert result.stat().st_mtime_ns == written, "a finished cell was done again"

    runs = command.runs()
    assert set(runs) == {"grid", "s_dense_synthetic_small", "moe_at_synthetic_small"}
    status, tags, _ = runs["grid"]
    assert (status, tags["status"], tags["cells_finished"]) == ("FAILED", "failed", "2")
    assert tags["cell/s_dense_synthetic_small seed 0"].startswith("finished: SA ")
    assert "does not exist" in tags["cell/moe_at_cifar10_small seed 0"]
    for name in ("s_dense_synthetic_small", "moe_at_synthetic_small"):
        status, child, steps = runs[name]
        assert (status, child["mlflow.parentRunId"]) == ("FINISHED", tags["id"])
        assert steps == [7, 14, 21]
    (log,) = (command.home / "runs" / "robust-moe").glob("grid-*/logs/moe_at_synthetic*.log")
    assert "continues after epoch" in log.read_text()


OBEDIENT = (  # a cell that says when it is there, and how it was ended
    "import signal, sys, time, pathlib\n"
    "at = pathlib.Path(sys.argv[1])\n"
    "signal.signal(signal.SIGTERM, lambda *_: (at.write_text('stopped'), sys.exit(1)))\n"
    "at.write_text('ready')\n"
    "time.sleep(300)"
)


class Notes:
    """A log without MLflow: which cells were stopped, and how many there are."""

    def __init__(self, configs: tuple[Config, ...]):
        self.entries = [
            CellRecord(name=c.name, seed=c.seed, fingerprint=c.fingerprint, folder="")
            for c in configs
        ]
        self.stops: list[int] = []

    def stopped(self, place: int) -> None:
        self.stops.append(place)


def test_an_interrupt_ends_every_process_before_it_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = read_request({"backbone": "small", "dataset": "digits", "seed": "0,1,2"})
    log = Notes(request.configs)
    started: list[scheduler.Running] = []

    def start(_: Any, place: int, address: str) -> scheduler.Running:
        at = tmp_path / str(place)
        words = [sys.executable, "-c", OBEDIENT, str(at)]
        process = subprocess.Popen(words, text=True, start_new_session=True)
        started.append(scheduler.Running(place, process, at, 0, 0.0))
        return started[-1]

    def interrupt_once_all_are_there(_: float) -> None:
        there = [run.output.exists() and run.output.read_text() == "ready" for run in started]
        if all(there) and len(started) == 2:
            monkeypatch.setattr(scheduler.time, "sleep", sleep)
            raise KeyboardInterrupt
        sleep(0.05)

    sleep = time.sleep
    monkeypatch.setattr(scheduler, "start", start)
    monkeypatch.setattr(scheduler.time, "sleep", interrupt_once_all_are_there)
    with pytest.raises(KeyboardInterrupt):
        scheduler.drive(log, [0, 1, 2], 2, address="", say=lambda _: None)  # type: ignore[arg-type]
    assert [run.output.read_text() for run in started] == ["stopped", "stopped"]
    assert [run.process.poll() for run in started] == [1, 1]
    assert log.stops == [0, 1]


class Ends(Notes):
    """Notes that also take down how cells ended, in order."""

    def __init__(self, configs: tuple[Config, ...]):
        super().__init__(configs)
        self.codes: list[tuple[int, int]] = []

    def ended(self, place: int, code: int, reason: str, seconds: float) -> CellRecord:
        self.codes.append((place, code))
        self.entries[place].status = "finished" if code == 0 else "preempted"
        return self.entries[place]


@pytest.mark.parametrize(("stubborn", "tries"), [(1, 2), (9, 4)])
def test_a_cell_that_lost_its_place_goes_on_behind_the_others_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: int, tries: int
) -> None:
    request = read_request({"backbone": "small", "dataset": "digits", "seed": "0,1"})
    log, starts = Ends(request.configs), list[int]()
    room = iter([0, 1, 1, 1, 1, 1, 1, 1])  # never more than one at a time, and never none

    def start(_: Any, place: int, address: str) -> scheduler.Running:
        starts.append(place)
        code = 75 if place == 0 and starts.count(0) <= stubborn else 0
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"], text=True)
        at = tmp_path / str(len(starts))
        at.touch()
        return scheduler.Running(place, process, at, 0, 0.0)

    monkeypatch.setattr(scheduler, "start", start)
    scheduler.drive(
        log,  # type: ignore[arg-type]
        [0, 1],
        2,
        address="",
        say=lambda _: None,
        room=lambda: next(room, 1),
    )
    assert starts == [0, 1] + [0] * (tries - 1)
    assert log.codes == list(
        zip(starts, [75, 0, *[75] * (tries - 2), 0 if tries == 2 else 75], strict=True)
    )


def test_a_cell_stops_itself_once_the_grid_is_gone(tmp_path: Path) -> None:
    """Its standard input ends, whoever held the other end and however that one died."""
    code = (
        "import signal, sys, threading, time\n"
        "from pipeline.grid.cell_process import stop_with_parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "threading.Thread(target=stop_with_parent, daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=120) == 7


def test_run_of_a_process_that_died_is_ended_for_it(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.open(
        tmp_path / "run", tracking_uri=uri, experiment="e", name="n", params={}, tags={}
    )
    tracker._finish(20)  # as if it were killed: nothing says that the run is over
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "RUNNING"
    assert end_abandoned(tmp_path / "run", uri, "preempted")
    ended = MlflowClient(uri).get_run(tracker.run_id)
    assert (ended.info.status, ended.data.tags["status"]) == ("KILLED", "preempted")
    assert end_abandoned(tmp_path / "run", uri, "failed"), "one that is over stays as it ended"
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "KILLED"
    assert send_rest(tmp_path / "run", uri, tags={"mlflow.parentRunId": "p"})
    assert send_rest(tmp_path / "run", uri, tags={"mlflow.parentRunId": "q"})
    assert MlflowClient(uri).get_run(tracker.run_id).data.tags["mlflow.parentRunId"] == "p"


@pytest.mark.slow
def test_ctrl_c_stops_all_cells_and_the_same_command_goes_on(command: Command) -> None:
    words = ["dataset=synthetic", "algorithm=s_dense", "seed=0,1", "epochs=8"]
    driver = command.start(*words, "name=two")
    wait_for(lambda: command.checkpoints("s_dense_synthetic_small") > 1, command)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=120) == 75
    out = command.log.read_text()
    assert re.search(r"stopped; [12] cell\(s\) left, which the same command continues", out), out
    assert not processes_in(command.home)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{command.home}/mlflow.db")
    (where,) = [e.experiment_id for e in client.search_experiments() if e.name == "robust-moe"]
    statuses = [run.info.status for run in client.search_runs([where])]
    assert "RUNNING" not in statuses
    assert "KILLED" in statuses

    code, out = command.run(*words, "name=two")
    assert code == 0, out
    assert [run.info.status for run in client.search_runs([where])] == ["FINISHED"] * 3


def processes_in(home: Path) -> list[str]:
    """Command lines of the cells' processes that work in a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            words = (link.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if link.resolve() == home and "pipeline.grid.cell_process" in words:
                found.append(words)
        except OSError:
            continue
    return found


def test_keys_that_a_run_lacks_are_not_held() -> None:
    config = cell("small", "digits", "dense")
    assert held(config, {"epochs": 1, "algorithm.router_loss": "trades"}) == {"epochs": 1}
