"""The doctor and the check before a run, against a real Ray and a real MLflow server."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.distributed import preflight
from pipeline.distributed.dashboard import ask, look_at_dashboard

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def end(process: subprocess.Popen[str], mark: str | None = None) -> None:
    """End a process with all below it, and those whose command line bears the mark."""
    rows = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parent = {int(row.split()[0]): int(row.split()[1]) for row in rows}
    victims = {int(row.split()[0]) for row in rows if mark and mark in row}
    for child in parent:
        above = child
        while above in parent and above != process.pid:
            above = parent[above]
        if above == process.pid:
            victims.add(child)
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for victim in victims - {process.pid, os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


class Head:
    """``ray start --head`` with a token, on loopback, in folders of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rm"))  # short: sockets have short names
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.port, self.dashboard, *rest = free_ports(5)
        self.env = os.environ | {
            "HOME": str(self.folder),
            "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
            "PYTHON": sys.executable,
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            self.env.pop(name, None)
        words = f"--head --block --num-cpus 2 --node-ip-address 127.0.0.1 --port {self.port} "
        words += f"--dashboard-port {self.dashboard} --ray-client-server-port {rest[0]} "
        words += f"--dashboard-agent-listen-port {rest[1]} --dashboard-agent-grpc-port {rest[2]} "
        words += f"--disable-usage-stats --temp-dir {self.folder}/ray"
        with (self.folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [str(RAY), "start", *words.split()], env=self.env, stdout=log, stderr=log, text=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def wait(self) -> None:
        deadline = time.monotonic() + 240
        while ask(f"{self.url}/api/version").status == 0:
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def run(self, *words: str, **changes: str) -> tuple[int, str]:
        done = subprocess.run(
            words, cwd=self.folder, env=self.env | changes, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def doctor(self, *settings: str, **changes: str) -> tuple[int, dict[str, str]]:
        here = {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        words = (sys.executable, "-m", "pipeline.doctor", *settings)
        code, out = self.run(*words, **(here | changes))
        lines = [line for line in out.splitlines() if line[:5] in ("ok   ", "FAIL ")]
        assert lines, out
        return code, {line.split()[1]: line for line in lines}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    made = Head()
    try:
        made.wait()
        yield made
    finally:
        end(made.process, str(made.folder))
        shutil.rmtree(made.folder, ignore_errors=True)


def test_good_cluster_has_a_line_for_everything_and_no_failure(head: Head) -> None:
    code, lines = head.doctor("workers=2", f"storage={head.folder}/runs")
    assert code == 0, lines
    asked = "versions authentication mlflow ray dashboard resources nodes storage disk interpreter"
    assert set(lines) == set(asked.split())
    assert all(line.startswith("ok ") for line in lines.values())
    assert "from 1 node(s)" in lines["storage"]
    assert "ray 2." in lines["interpreter"], "what the head's own python says"
    assert not list((head.folder / "runs").iterdir()), "no mark is left"


def test_too_many_workers_and_a_folder_that_cannot_be_written_are_named(head: Head) -> None:
    (head.folder / "file").touch()
    bad = ("workers=99", "batch_size=198", f"storage={head.folder}/file/runs")
    code, lines = head.doctor(*bad)
    assert code == 1
    failed = {name for name, line in lines.items() if line.startswith("FAIL ")}
    assert failed == {"resources", "storage"}
    assert "workers must be at most the cluster's 2 CPUs, got 99" in lines["resources"]
    assert "fix: workers=2" in lines["resources"]
    assert "cannot be written: Not a directory" in lines["storage"]


def test_wrong_token_ends_with_lines(head: Head) -> None:
    wrong = {"RAY_AUTH_TOKEN": "0" * 64}
    code, lines = head.doctor(RAY_ADDRESS=head.url, **wrong)
    assert code == 1
    assert "wrong token" in lines["dashboard"]
    code, lines = head.doctor(RAY_ADDRESS=head.url, RAY_AUTH_TOKEN_PATH=f"{head.folder}/none")
    assert code == 1
    assert lines["authentication"].startswith("FAIL ")
    assert "no token" in lines["dashboard"]


def test_submission_runs_with_the_token_and_is_refused_without(head: Head) -> None:
    script = str(ROOT / "cluster" / "submit.sh")
    words = ("python", "-m", "pipeline.train", "workers=99", "batch_size=198", "epochs=1")
    words += (f"storage={head.folder}/runs", "dataset.train_images=200")
    code, out = head.run(script, *words, RAY_ADDRESS=head.url, RAY_AUTH_TOKEN_PATH="/nowhere")
    assert code == 1
    assert out.splitlines() == [line for line in out.splitlines() if "wants a token" in line]
    began = time.monotonic()
    code, out = head.run(script, *words, RAY_ADDRESS=head.url)
    assert code == 1
    assert "submitted successfully" in out
    assert "error: ValueError: workers must be at most the cluster's 2 CPUs, got 99" in out
    assert time.monotonic() - began < 200, "a line, and not Train's rounds of waiting"
    token = (head.folder / "token").read_text()
    assert token not in out
    assert look_at_dashboard(head.url).state in ("no token", "wrong token")


# MLflow ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server that takes ``localhost`` and not ``127.0.0.1``."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    words = f"server --host 127.0.0.1 --port {port} --workers 1 --allowed-hosts localhost:*"
    words += f" --backend-store-uri sqlite:///{folder}/mlflow.db"
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words.split()],
            cwd=folder, env=environment, stdout=log, stderr=log, text=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while ask(f"http://127.0.0.1:{port}/health").status != 200:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield port
    finally:
        end(process)


def tracked(uri: str) -> doctor.Finding:
    return doctor.tracking(override(Config(), {"tracking_uri": uri}))


def test_mlflow_that_answers_is_good_and_one_that_refuses_the_host_is_mended(mlflow: int) -> None:
    assert tracked(f"http://localhost:{mlflow}").fix == ""
    refused = tracked(f"http://127.0.0.1:{mlflow}")
    assert "status 403" in refused.text
    assert '--allowed-hosts "127.0.0.1:*' in refused.fix


def test_mlflow_that_is_away_or_is_another_server_is_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    assert "no answer" in tracked(f"http://127.0.0.1:{port}").text
    assert "port reachable" in tracked(f"http://127.0.0.1:{port}").fix
    assert tracked(f"sqlite:///{tmp_path}/mlflow.db").fix == ""
    assert "make" in tracked(f"sqlite:///{tmp_path}/nowhere/mlflow.db").fix


def test_password_of_mlflow_is_in_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(doctor.tracking(Config()))


# What needs no server ----------------------------------------------------------------------------


def test_folder_without_the_drivers_mark_is_another_folder(tmp_path: Path) -> None:
    assert "does not see" in preflight.usable(tmp_path, ".mark")
    (tmp_path / ".mark").touch()
    assert preflight.usable(tmp_path, ".mark") == ""
    assert [file.name for file in tmp_path.iterdir()] == [".mark"]


def test_storage_that_one_node_lacks_stops_the_run_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [preflight.Node("10.0.0.1", silent="no answer in 180 s")]
    monkeypatch.setattr(preflight, "capacity", lambda: {"CPU": 2.0})
    monkeypatch.setattr(preflight, "alive", lambda: [{}, {}])
    monkeypatch.setattr(preflight, "survey", lambda _: nodes)
    preflight.preflight(Config())  # a node that is only busy does not
    nodes.append(preflight.Node("10.0.0.2", storage="does not see it"))
    with pytest.raises(
        ValueError, match=r"that all nodes share.*10\.0\.0\.2: does not see it"
    ) as e:
        preflight.preflight(Config())
    assert "10.0.0.1" not in str(e.value)


def test_autoscalers_room_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0, "node:a": 1.0})
    assert preflight.capacity()["CPU"] == 1
    monkeypatch.setenv("ROBUST_MOE_CAPACITY", "CPU=32,GPU=4")
    assert preflight.capacity() == {"CPU": 32.0, "GPU": 4.0, "node:a": 1.0}
    assert preflight.shortage(32, preflight.capacity()) == ""
    monkeypatch.setenv("ROBUST_MOE_CAPACITY", "many")
    with pytest.raises(ValueError, match="ROBUST_MOE_CAPACITY must be like"):
        preflight.capacity()


def test_disk_that_is_nearly_full_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert preflight.full(tmp_path / "not" / "yet") in ("", preflight.full(tmp_path))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: (100 << 30, 97 << 30, 3 << 30))
    assert "3.0 GiB free of 100.0" in preflight.full(tmp_path)


@pytest.mark.parametrize(
    ("address", "mode", "token", "fix"),
    [
        ("", "", False, ""),
        ("http://10.0.0.1:8265", "token", True, ""),
        ("http://10.0.0.1:8265", "", True, "say RAY_AUTH_MODE=token"),
        ("http://10.0.0.1:8265", "token", False, "ray get-auth-token --generate"),
        ("http://10.0.0.1:8265", "disabled", False, "whoever reaches the head"),
        ("http://127.0.0.1:8265", "disabled", False, ""),
        ("10.0.0.1:6379", "disabled", False, "whoever reaches the head"),
        ("", "yes", False, "RAY_AUTH_MODE is token or disabled"),
    ],
)
def test_authentication_is_judged_by_address_mode_and_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, mode: str, token: bool, fix: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64 if token else "")
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    finding = doctor.authentication(address)
    assert fix in finding.fix
    assert bool(finding.fix) == bool(fix)
    assert "a" * 64 not in str(finding)


def test_versions_are_those_of_this_environment() -> None:
    finding = doctor.versions()
    assert finding.fix == ""
    assert f"python {sys.version_info.major}.{sys.version_info.minor}" in finding.text
