"""The train command as a user runs it: bad input, a run, its faults, its continuation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline import train
from pipeline.distributed import events

ROOT = Path(__file__).parents[2]
TINY = (
    "dataset=synthetic dataset.size=8 dataset.train_images=256 dataset.test_images=32 "
    "batch_size=32 evaluation.steps=2 evaluation.validation_steps=1 name=tiny"
).split()
BARE = (  # the same run in one process, as a user's own script calls the loop
    "import sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
    "from pipeline.config import override; from pipeline.presets import PRESETS;"
    "from pipeline.loop import fit;"
    "c = override(PRESETS['quickstart'](), dict(a.split('=', 1) for a in sys.argv[2:]));"
    "fit(c, Path(sys.argv[1]))"
)


class Command:
    """``python -m pipeline.train`` in a working directory of its own."""

    def __init__(self, home: Path):
        self.home = home
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.env.pop("MLFLOW_TRACKING_URI", None)
        self.env.pop("RAY_ADDRESS", None)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.train", *arguments],
            cwd=self.home,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        out, _ = process.communicate(timeout=300)
        return process.returncode, out

    @property
    def folder(self) -> Path:
        (found,) = (self.home / "runs" / "robust-moe").glob("tiny-????????")
        return found


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


def checkpoints(command: Command) -> list[str]:
    runs = command.home / "runs" / "robust-moe"
    return sorted(p.name for p in runs.glob("tiny-????????/checkpoints/step_*"))


def undisturbed(home: Path, *settings: str) -> dict[str, object]:
    folder = home / "undisturbed"
    subprocess.run(
        [sys.executable, "-c", BARE, str(folder), *TINY, *settings],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return last_weights(folder)


def last_weights(folder: Path) -> dict[str, object]:
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / "model.safetensors")


def mlflow_runs(home: Path) -> list[tuple[str, dict[str, str], dict[str, list[int]]]]:
    """Status, tags, and steps of every metric, of each run in the default store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("robust-moe")
    assert experiment is not None
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        steps = {
            key: [m.step for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        found.append((run.info.status, dict(run.data.tags), steps))
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], r"no preset 'nothing'; nearest: "),
        (["wrong=1"], r"no key 'wrong'; nearest: "),
        (["algorithm.wrong=1"], r"no key 'algorithm.wrong'; nearest: algorithm."),
        (["backbone.ratio=0"], r"backbone.ratio must be above 0 and at most 1, got 0.0"),
        (["backbone.num_experts=0"], r"backbone.num_experts must be at least 1, got 0"),
        (["batch_size=33"], r"batch_size must be a multiple of workers \(2\), got 33"),
        (["epochs=two"], r"epochs must be a whole number, got 'two'"),
        (["algorithm.attack.eps=1/0"], r"algorithm.attack.eps must be a number"),
        (["precision=fp16"], r"precision must be one of fp32, bf16, got 'fp16'"),
        (["name=../escape"], r"name must be a plain name"),
        (["--wrong"], r"no option '--wrong'"),
        (["epochs=1", "epochs=2"], r"epochs is given twice"),
    ],
)
def test_bad_input_names_the_key_the_value_and_what_is_valid(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(arguments)


def test_bad_input_ends_with_code_2_and_one_line(command: Command) -> None:
    code, out = command.run("backbone.ratio=0")
    assert code == 2
    assert out.splitlines() == ["error: backbone.ratio must be above 0 and at most 1, got 0.0"]


def test_a_missing_data_folder_ends_with_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(command.home)
    assert train.run(["dataset=cifar10", "dataset.path=nowhere", "dataset.pad=4"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "nowhere" in err


def test_a_run_on_two_workers_ends_with_a_table_and_a_whole_mlflow_record(
    command: Command,
) -> None:
    code, out = command.run(*TINY, "epochs=2")
    assert code == 0, out
    assert "test/ra_worst" in out
    ((status, tags, steps),) = mlflow_runs(command.home)
    assert status == "FINISHED"
    assert tags["status"] == "finished"
    assert {"commit", "fingerprint", "dataset_sha256"} <= set(tags)
    assert steps["val/ra"] == [7, 14]
    shares = ["sa", "ra_pgd2", "ra_pgd2_margin", "ra_forced", "ra_router", "ra_expert", "ra_worst"]
    wanted = {f"test/{name}{end}" for name in shares for end in ("", "_low", "_high")}
    wanted |= {f"cost/{n}" for n in ("gmac", "gmac_router", "params", "ratio_to_dense")}
    wanted |= {"cost/images_per_second", "train/images_per_second", "val/sa"}
    wanted |= {"route/entropy", "route/flip_rate", "route/load_0", "route/load_1"}
    assert wanted <= set(steps)
    run_id = json.loads((command.folder / "run.json").read_text())["run_id"]
    artifacts = command.home / "mlartifacts" / "robust-moe" / run_id / "artifacts"
    for path in ("config.json", "card.md", "plots/losses.png", "checkpoints/best/meta.json"):
        assert (artifacts / path).is_file(), path

    code, out = command.run(*TINY, "epochs=2")
    assert code == 0
    assert "is finished" in out
    assert "--fresh" in out
    assert len(mlflow_runs(command.home)) == 1


def test_ctrl_c_and_the_same_command_continue_the_same_run(command: Command) -> None:
    settings = ["epochs=6", "workers=1"]
    process = command.start(*TINY, *settings)
    wait_for(lambda: len(checkpoints(command)) > 1, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 75, out
    assert "the same command continues" in out
    ((status, tags, _),) = mlflow_runs(command.home)
    assert (status, tags["status"]) == ("KILLED", "preempted")

    code, out = command.run(*TINY, *settings)
    assert code == 0, out
    assert "continues after" in out
    ((status, tags, steps),) = mlflow_runs(command.home)
    assert (status, tags["status"]) == ("FINISHED", "finished")
    assert steps["val/ra"] == [7, 14, 21, 28, 35, 42]
    same_to_the_bit(last_weights(command.folder), undisturbed(command.home, *settings))


def same_to_the_bit(ours: dict[str, object], theirs: dict[str, object]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name  # type: ignore[attr-defined]


def test_events_survive_a_queue_that_answers_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with too much to do an answer outlives the driver's patience."""
    import ray

    answers = [ray.exceptions.GetTimeoutError(), [{"kind": "finished"}], []]
    asked: list[int] = []

    class EventQueue:
        class take:  # noqa: N801
            @staticmethod
            def remote() -> int:
                asked.append(len(asked))
                return asked[-1]

    def get(reference: int, timeout: float) -> list[dict[str, str]]:
        answer = answers.pop(0) if answers else []
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    handled: list[dict[str, str]] = []
    with events.delivering(EventQueue, handled.append):
        while not handled:
            time.sleep(0.01)
    assert handled == [{"kind": "finished"}]
    assert asked == list(range(len(asked)))
    assert not answers
