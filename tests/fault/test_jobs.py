"""Jobs on a head with a token: sent from a clean clone, refused without it, stopped, continued."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.faults import ROOT, WORDS, alive, await_end, descendants, leftovers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BIN = Path(sys.executable).parent
STORE = "storage={home}/runs tracking_uri=sqlite:///{home}/mlflow.db"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with_sockets = [socket.socket() for _ in range(count)]
    for each in with_sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_sockets]
    for each in with_sockets:
        each.close()
    return ports


class Head:
    """``ray start --head`` as the README of the cluster starts it, on ports of its own."""

    def __init__(self, home: Path):
        self.home, self.temp = home, Path(tempfile.mkdtemp(prefix="ray-"))
        gcs, self.port, client, *agent = free_ports(5)
        token = home / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"http://127.0.0.1:{self.port}",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("MLFLOW_TRACKING_URI", "ROBUST_MOE_DATA", "PYTHONPATH", "RAY_AUTH_TOKEN"):
            self.env.pop(name, None)
        words = (
            f"start --head --block --port {gcs} --dashboard-host 127.0.0.1 --disable-usage-stats "
            f"--dashboard-port {self.port} --ray-client-server-port {client} --num-cpus 2 "
            f"--dashboard-agent-listen-port {agent[0]} --dashboard-agent-grpc-port {agent[1]} "
            f"--temp-dir {self.temp}"
        )
        bare = {k: v for k, v in self.env.items() if k != "RAY_ADDRESS"}
        self.log = home / "head.txt"
        self.process = subprocess.Popen(
            [str(BIN / "ray"), *words.split()],
            cwd=home,
            env=bare,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 300
        while self.jobs("list", check=False).returncode:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(1)

    def jobs(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``ray job ...``."""
        return subprocess.run(
            [str(BIN / "ray"), "job", *words],
            env=self.env,
            capture_output=True,
            text=True,
            check=check,
            timeout=600,
        )

    def lines(self, job: str) -> str:
        """What a job has said, without the words that ``ray job logs`` adds in colours."""
        return (self.temp / "session_latest" / "logs" / f"job-driver-{job}.log").read_text()

    def close(self) -> None:
        below = descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        deadline = time.monotonic() + 30
        while alive(below) and time.monotonic() < deadline:
            time.sleep(0.5)
        for line in alive(below):
            os.kill(int(line.split()[0]), 9)
        await_end(below)
        shutil.rmtree(self.temp, ignore_errors=True)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    made = Head(tmp_path)
    yield made
    made.close()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project from a fresh clone, or where there is no repository a copy of what it sends."""
    folder = tmp_path / "clone"
    if (ROOT / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    else:
        for name in ("moe", "pipeline", "cluster"):
            shutil.copytree(ROOT / name, folder / name)
    return folder


def submit(head: Head, clone: Path, *words: str, **changes: str) -> tuple[int, str]:
    """Send a command from a folder, as the README says; return the exit code and the lines."""
    sent = subprocess.run(
        ["bash", "cluster/submit.sh", *words],
        cwd=clone,
        env=head.env | changes,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    return sent.returncode, sent.stdout + sent.stderr


def wait_until(head: Head, condition: object, job: str) -> None:
    deadline = time.monotonic() + 900
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, head.lines(job)
        time.sleep(0.3)


def records(home: Path) -> list[tuple[str, str]]:
    """Status and tag of every MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (where,) = [e.experiment_id for e in client.search_experiments() if e.name == "robust-moe"]
    found = client.search_runs([where])
    return sorted((record.info.status, record.data.tags["status"]) for record in found)


TRAIN = "python -m pipeline.train name=tiny workers=1 epochs=30 algorithm.attack.steps=8"
GRID = (
    "python -m pipeline.grid backbone=small backbone.ratio=0.125 dataset=synthetic precision=fp32 "
    "algorithm=s_dense seed=0,1 epochs=30 algorithm.attack.steps=12"
)


@pytest.mark.parametrize(("command", "runs"), [(TRAIN, 1), (GRID, 3)], ids=["train", "grid"])
def test_stopped_job_is_preempted_with_a_checkpoint_and_the_same_command_continues(
    head: Head, clone: Path, tmp_path: Path, command: str, runs: int
) -> None:
    small = [w for w in WORDS if runs == 1 or w != "dataset=synthetic"]
    words = [*command.split(), *small, *STORE.format(home=tmp_path).split()]
    none = str(tmp_path / "no-token")
    code, out = submit(head, clone, *words, RAY_AUTH_TOKEN_PATH=none)
    assert code == 1
    assert "wants a token and there is none here" in out
    assert not (tmp_path / "runs").exists()

    code, out = submit(head, clone, "--no-wait", "id=first", "--", *words)
    assert code == 0, out
    found = tmp_path / "runs" / "robust-moe"
    cells = max(1, runs - 1)

    def all_at_work() -> bool:
        kept = {path.parents[1].name for path in found.glob("*/checkpoints/step_*")}
        return len(kept) == cells

    wait_until(head, all_at_work, "first")
    head.jobs("stop", "first")
    status = head.jobs("status", "first")
    assert "STOPPED" in (status.stdout + status.stderr).upper()
    assert records(tmp_path) == [("KILLED", "preempted")] * runs
    said = head.lines("first")
    assert "\x1b" not in said, "no colours"
    assert "\r" not in said, "no bars"
    told = [said, *(path.read_text() for path in found.glob("grid-*/logs/*.log"))]
    assert sum(text.count("stopped after epoch") for text in told) == cells, told
    assert "the same command continues" in said
    for path in found.glob("*-????????"):
        assert leftovers(path) == []

    code, out = submit(head, clone, "id=second", "--", *words)
    assert code == 0, out
    told = [head.lines("second"), *(p.read_text() for p in found.glob("grid-*/logs/*.log"))]
    assert sum(text.count("continues after epoch") for text in told) == cells, told
    assert records(tmp_path) == [("FINISHED", "finished")] * runs
