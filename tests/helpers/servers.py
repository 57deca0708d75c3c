"""Servers that tests start, stop and start again: MLflow, PostgreSQL, an object store, a proxy."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

DEBIAN = "/usr/lib/postgresql"


def closed_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Whether a server says 200 there."""
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@dataclass
class Mlflow:
    """A lean ``mlflow server``, always on the same port, database and artifact folder."""

    database: str
    folder: Path
    port: int = field(default_factory=closed_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> str:
        """Start it, wait for its first answer; return its address."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: answers(f"{self.uri}/health"), 120)
        return self.uri

    def freeze(self) -> None:
        """Let it take connections and answer nothing, as a machine that swaps does."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill it and its workers: the process group that was made for it."""
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)


class Proxy:
    """Stands before a server and, by ``mode``, passes on or spoils what it says.

    ``pass``; ``500``: the server never hears of it; ``lost``: the server does it, and 500 is said.
    """

    def __init__(self, target: str):
        self.mode, self.seen = "pass", list[str]()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen.append(f"{self.command} {self.path}")
                if proxy.mode == "500":
                    self.answer(500, b"{}")
                    return
                kept = ("Content-Type", "Accept")
                headers = {k: v for k, v in self.headers.items() if k in kept}
                request = urllib.request.Request(
                    target + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as found:
                        status, text = found.status, found.read()
                except urllib.error.HTTPError as error:
                    status, text = error.code, error.read()
                self.answer(*((500, b"{}") if proxy.mode == "lost" else (status, text)))

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_any

            def answer(self, status: int, text: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Postgres:
    """A PostgreSQL cluster of the test's own, on loopback, as a user that is not root."""

    folder: Path
    port: int = field(default_factory=closed_port)

    @property
    def uri(self) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/postgres"

    def start(self) -> "Postgres":
        """Make the cluster and start it, or skip the test and say why."""
        self._bin = postgres_folder()
        pytest.importorskip("psycopg", reason="PostgreSQL's driver psycopg is not installed")
        self.folder.mkdir()
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
            for parent in self.folder.parents:  # pytest's folders are closed to other users
                if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                    parent.chmod(parent.stat().st_mode | 0o011)
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {self.port} -h 127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", data, "-l", log, "-w", "-t", "60", "-o", options, "start")
        return self

    def stop(self) -> None:
        if hasattr(self, "_bin") and (self.folder / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *words: str) -> None:
        command = [f"{self._bin}/{program}", *words]
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        done = subprocess.run(
            command,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server runs
            stderr=subprocess.DEVNULL,
            check=False,
        )
        log = self.folder / "log"
        said = log.read_text()[-500:] if log.exists() else ""
        assert done.returncode == 0, f"{program} ended with {done.returncode}: {said}"


def postgres_folder() -> str:
    """Find PostgreSQL's programs, or skip the test."""
    places = [*sorted(Path(DEBIAN).glob("*/bin"), reverse=True)]
    if found := shutil.which("initdb"):
        places.append(Path(found).resolve().parent)
    there = [place for place in places if (place / "initdb").exists()]
    if not there:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    if os.getuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv")
    return str(there[0])


def points(uri: str, run_id: str | None, key: str) -> list[Any]:
    """Every point of a metric as the server has it, in the order of their times."""
    from mlflow import MlflowClient

    found = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted(found, key=lambda point: (point.timestamp, point.step))


@dataclass
class ObjectStore:
    """A process that speaks S3 on loopback, with one bucket."""

    log: Path
    port: int = field(default_factory=closed_port)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it, and nothing else by mistake."""
        return {
            "AWS_ENDPOINT_URL": self.uri,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> "ObjectStore":
        pytest.importorskip("moto", reason="moto, an S3 server for tests, is not installed")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: answers(f"{self.uri}/moto-api/"), 120)
        request = urllib.request.Request(f"{self.uri}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        return self

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
