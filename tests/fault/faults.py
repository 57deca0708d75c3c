"""What the tests of faults share: small runs, in this process or as a user starts them."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.context import Session
from pipeline.loop import fit

ROOT = Path(__file__).parents[2]
TINY = override(
    Config(),
    {
        "dataset": "synthetic",
        "dataset.size": 8,
        "dataset.classes": 4,
        "dataset.train_images": 90,
        "dataset.test_images": 16,
        "dataset.pad": 1,
        "dataset.flip": True,
        "backbone.ratio": 0.125,
        "algorithm.attack.steps": 1,
        "evaluation.steps": 1,
        "evaluation.validation_steps": 1,
        "epochs": 3,
        "batch_size": 20,  # four updates an epoch
        "lr": 0.02,
    },
)
WORDS = (  # the same size on the command line
    "dataset=synthetic dataset.size=8 dataset.train_images=256 dataset.test_images=32 "
    "batch_size=32 evaluation.steps=2 evaluation.validation_steps=1"
).split()
Events = list[Mapping[str, Any]]


class StopError(Exception):
    """Stands for whatever ends a process."""


# Runs in this process


def run(
    config: Config,
    folder: Path,
    at: Callable[[Mapping[str, Any]], None] | None = None,
    **session: Any,
) -> Events:
    """Fit in this process; ``at`` sees every event as it happens, and may raise."""
    events: Events = []

    def take(event: Mapping[str, Any]) -> None:
        events.append(copy.deepcopy(event))
        if at is not None:
            at(event)

    fit(config, folder, Session(emit=take, **session))
    return events


def after(kind: str, count: int, then: Callable[[], None]) -> Callable[[Mapping[str, Any]], None]:
    """Do something at the count-th event of a kind."""
    seen = 0

    def at(event: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += event["kind"] == kind
        if event["kind"] == kind and seen == count:
            then()

    return at


def die() -> None:
    raise StopError


def steps(folder: Path) -> list[int]:
    """Updates of the checkpoints that are kept, each whole."""
    found = sorted((folder / "checkpoints").glob("step_*"))
    return [checkpoint.verify(path)["update"] for path in found]


def last_weights(folder: Path) -> dict[str, Tensor]:
    newest, passed = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    assert passed == []
    state: dict[str, Tensor] = checkpoint.load_model(newest).state_dict()
    return state


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = last_weights(one), last_weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def leftovers(folder: Path) -> list[str]:
    """Files and folders that were begun and not finished; Ray's own folder is Ray's affair."""
    found = [path.relative_to(folder) for path in folder.rglob("*")]
    own = [path for path in found if path.parts[0] != "ray"]
    return [str(path) for path in own if path.name[0] == "." or path.suffix in {".new", ".old"}]


# Runs as a user starts them


class Command:
    """``python -m MODULE`` in a working directory of its own, told in a file."""

    def __init__(self, home: Path, **environment: str):
        self.home, self.log = home, home / "out.txt"
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        for name in ("MLFLOW_TRACKING_URI", "ROBUST_MOE_DATA", "RAY_ADDRESS"):
            if name not in environment:
                self.env.pop(name, None)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, *words: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as file:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *words],
                    cwd=self.home,
                    env=self.env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
        return self.started[-1]

    def run(self, module: str, *words: str) -> tuple[int, str]:
        return self.end(self.start(module, *words))

    def end(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Wait for a process; return its exit code and what it said."""
        try:
            code = process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=60)
            raise AssertionError(self.log.read_text()) from None
        return code, self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something has happened, as long as the process lives."""
        deadline = time.monotonic() + 900
        while not condition():
            assert self.started[-1].poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def folder(self, name: str) -> Path:
        (found,) = (self.home / "runs" / "robust-moe").glob(f"{name}-????????")
        return found

    def checkpoints(self, name: str = "*") -> list[str]:
        runs = self.home / "runs" / "robust-moe"
        return sorted(path.name for path in runs.glob(f"{name}-????????/checkpoints/step_*"))

    def runs(self) -> dict[str, tuple[str, dict[str, str], list[int]]]:
        """Status, tags and epochs' steps of every MLflow run, by name; a grid's as ``grid``."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.home}/mlflow.db")
        experiment = client.get_experiment_by_name("robust-moe")
        assert experiment is not None
        found = {}
        for record in client.search_runs([experiment.experiment_id]):
            name = re.sub(r"^grid-.*", "grid", record.info.run_name)
            assert name not in found, "a run has two records"
            history = client.get_metric_history(record.info.run_id, "val/ra")
            tags = record.data.tags | {"id": record.info.run_id}
            found[name] = (record.info.status, tags, [metric.step for metric in history])
        return found

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=90)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def parents() -> dict[int, int]:
    """Every process, and which one started it."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


def descendants(pid: int, named: str = "") -> list[int]:
    """Processes below one, those with a word in their command line or title."""
    parent = parents()

    def below(child: int) -> bool:
        while child in parent and child != pid:
            child = parent[child]
        return child == pid

    return [p for p in parent if p != pid and below(p) and named in title(p)]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pids: list[int]) -> list[str]:
    """Those of some processes that still run, by their titles."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(f"{pid} {title(pid)}")
    return found


def await_end(pids: list[int], seconds: float = 120) -> None:
    """Wait until processes are gone; fail with the names of those that stay."""
    deadline = time.monotonic() + seconds
    while left := alive(pids):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def undisturbed(folder: Path, preset: str, *words: str) -> Path:
    """The same run in one process, as a user's own script calls the loop."""
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from pipeline.config import override; from pipeline.presets import PRESETS;"
        "from pipeline.loop import fit;"
        "c = override(PRESETS[sys.argv[2]](), dict(a.split('=', 1) for a in sys.argv[3:]));"
        "fit(c, Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), preset, *words],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return folder
