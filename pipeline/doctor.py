"""Say what would keep a run from working here: ``python -m pipeline.doctor [key=value ...]``."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.cli.arguments import main, read_arguments
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.distributed.address import AddressError
from pipeline.distributed.cluster import ray_cluster
from pipeline.distributed.dashboard import Dashboard, ask, is_loopback, look_at_dashboard, ray_token
from pipeline.distributed.preflight import Node, capacity, dashboard_url, shortage, survey
from pipeline.presets import PRESETS
from pipeline.storage.sync import storage_root
from pipeline.tracking import resolve_uri, without_password
from pipeline.tracking.client import check_database
from pipeline.tracking.database_file import to_path
from pipeline.tracking.reasons import RefusedError

USAGE = """
usage: python -m pipeline.doctor [PRESET] [key=value ...]

Check what a run of these settings needs: versions, authentication, dashboard, MLflow, and, where
Ray can be joined, resources, interpreter, storage and disk of every node. One line each, with the
fix; exit code 1 if one fails. From a machine outside the cluster (RAY_ADDRESS=http://...) the
nodes cannot be asked; send it there: cluster/submit.sh python -m pipeline.doctor
"""
LEAST = {"ray": (2, 60), "torch": (2, 11), "mlflow": (3, 17), "pyarrow": (1,), "safetensors": (0,)}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, and the fix if it is bad."""

    name: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"; fix: {self.fix}" if self.fix else ""
        return f"{'FAIL' if self.fix else 'ok':<5} {self.name:<15} {self.text}{fix}"


def run(argv: list[str]) -> int:
    """Print the findings as they come; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    name = given.names[0] if given.names else "quickstart"
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}, only {', '.join(PRESETS)}")
    config = override(PRESETS[name](), given.settings)
    failed = 0
    for finding in findings(config):
        print(" ".join(str(finding).split("\n")), flush=True)
        failed += bool(finding.fix)
    return 1 if failed else 0


def findings(config: Config) -> Iterator[Finding]:
    """Look at one thing after the other; what cannot be asked from here is said to be so."""
    yield versions()
    address = os.environ.get("RAY_ADDRESS", "")
    yield authentication(address)
    yield tracking(config)
    if urlsplit(address).scheme in ("http", "https"):
        yield dashboard(address, look_at_dashboard(address))
        yield Finding("nodes", "not asked from here: cluster/submit.sh python -m pipeline.doctor")
        return
    try:
        with ray_cluster(config, check=lambda _: None):
            yield Finding("ray", f"joined {address}" if address else "a local Ray starts")
            yield from inside(config)
    except (AddressError, ConnectionError) as error:
        yield Finding("ray", str(error), "RAY_ADDRESS=host:6379 of a head that runs, or unset it")
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        fix = "compare RAY_ADDRESS, RAY_AUTH_MODE and the token with the head's"
        yield Finding("ray", f"cannot be joined: {type(error).__name__}: {lines[0][:300]}", fix)


def inside(config: Config) -> Iterator[Finding]:
    """Look at what only a process of the cluster sees."""
    if url := dashboard_url():
        yield dashboard(url, look_at_dashboard(url))
    has = capacity()
    lack = shortage(config.workers, has)
    fix = f"workers={int(has.get('CPU', 0))}, or more nodes" if lack else ""
    gpus = f"{has.get('GPU', 0):.0f} GPU(s)"
    found = f"{has.get('CPU', 0):.0f} CPU(s), {gpus} for workers={config.workers}"
    yield Finding("resources", lack or found, fix)
    nodes = survey(config.storage, versions=True)
    silent = [f"{node.host}: {node.silent}" for node in nodes if node.silent]
    fix = "look at its raylet.log, and whether it is overloaded" if silent else ""
    yield Finding("nodes", "; ".join(silent) or f"{len(nodes)} of {len(nodes)} answer", fix)
    nodes = [node for node in nodes if not node.silent]
    yield from storage(config, nodes)
    yield interpreters(nodes)


def versions() -> Finding:
    """Look at the packages here; what the tests passed with stands in constraints.txt."""
    pinned = Path(__file__).parents[1] / "constraints.txt"
    tested = dict(
        line.split("==") for line in (pinned.read_text().split() if pinned.exists() else ())
    )
    said, low = [f"python {platform.python_version()}"], []
    for name, least in LEAST.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            low.append(name)
            continue
        same = tested.get(name) in (None, found)
        said.append(f"{name} {found}" + ("" if same else f" (tested with {tested[name]})"))
        if (
            tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
            < least
        ):
            low.append(name)
    fix = f"{', '.join(low)}: pip install -c constraints.txt -e ." if low else ""
    if os.environ.get("RAY_TRAIN_V2_ENABLED", "1").lower() in ("0", "false"):
        fix = "unset RAY_TRAIN_V2_ENABLED: training needs Ray Train V2"
    return Finding("versions", ", ".join(said), fix)


def authentication(address: str) -> Finding:
    """Look at whether Ray's token will be sent, and which."""
    mode, token = os.environ.get("RAY_AUTH_MODE", ""), ray_token()
    seen = f"RAY_AUTH_MODE={mode or '(unset)'}, {'a' if token else 'no'} token"
    fix = ""
    if mode not in ("", "token", "disabled", "k8s"):
        fix = "RAY_AUTH_MODE is token or disabled"
    elif mode == "token" and not token:
        fix = "RAY_AUTH_TOKEN_PATH=FILE, or ray get-auth-token --generate where the head starts"
    elif address and not mode:
        fix = "say RAY_AUTH_MODE=token, on the head and here: unset, Ray may send no token"
    elif (
        address
        and mode == "disabled"
        and not is_loopback(address if "//" in address else f"//{address}")
    ):
        fix = "RAY_AUTH_MODE=token: whoever reaches the head can run code there"
    return Finding("authentication", seen, fix)


def dashboard(url: str, found: Dashboard) -> Finding:
    """Say what a dashboard lets in."""
    closed = os.environ.get("RAY_AUTH_MODE") == "token"
    fix = {
        "ready": "",
        "open": "start the head with RAY_AUTH_MODE=token" if closed or not is_loopback(url) else "",
        "no token": "set RAY_AUTH_TOKEN_PATH to a file with the head's token (ray get-auth-token)",
        "wrong token": "copy the head's token again (there: ray get-auth-token)",
        "away": "is the head running with ray[default], and the SSH tunnel open?",
        "other": "RAY_ADDRESS must be Ray's dashboard, port 8265",
    }[found.state]
    return Finding("dashboard", f"{url}: {found.state}, {found.detail}", fix)


def tracking(config: Config) -> Finding:
    """Ask MLflow for an experiment, as the driver will; host header and password included."""
    uri = resolve_uri(config.tracking_uri)
    shown = without_password(uri)
    if (file := to_path(uri)) is not None:
        if not os.access(file.parent, os.W_OK):
            return Finding("mlflow", shown, f"make {file.parent} a folder you may write")
        try:
            check_database(uri)
        except RefusedError as error:
            return Finding("mlflow", str(error), f"mlflow db upgrade {shown}")
        return Finding("mlflow", shown)
    if not uri.startswith("http"):
        return Finding("mlflow", f"{shown}: a database or a service, not asked")
    parts = urlsplit(uri)
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    headers = {"Content-Type": "application/json"}
    if user:
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    path = f"{shown}/api/2.0/mlflow/experiments/search"
    answer = ask(path, headers=headers, body=json.dumps({"max_results": 1}).encode(), wait=10)
    host = parts.hostname or ""
    fix = "is the server running, and its port reachable from here?"
    if answer.status == 200:
        fix = "" if answer.text.lstrip().startswith("{") else "this is not MLflow's API"
    elif answer.status == 403 and "host" in answer.text.lower():
        fix = f'start it with --allowed-hosts "{host}:*,localhost:*,127.0.0.1:*"'
    elif answer.status in (401, 403):
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    said = f"status {answer.status}" if answer.status else "no answer"
    detail = "" if answer.status == 200 else f" ({answer.text.strip()[:80]})"
    return Finding("mlflow", f"{shown}: {said}{detail}", fix)


def storage(config: Config, nodes: list[Node]) -> Iterator[Finding]:
    """Say which nodes cannot use the run folders' folder, and whose disks are nearly full."""
    bad = [f"{node.host}: {node.storage}" for node in nodes if node.storage]
    fix = "storage= a folder that all nodes share, writable by their user" if bad else ""
    there = config.storage if "://" in config.storage else storage_root(config.storage)
    seen = f"{there} from {len(nodes)} node(s)"
    yield Finding("storage", "; ".join([seen, *bad]), fix)
    low = [f"{node.host}: {node.disk}" for node in nodes if node.disk]
    fix = "delete old run folders and Ray sessions (in /tmp/ray, or --temp-dir)" if low else ""
    yield Finding("disk", "; ".join(low) or "room on every node", fix)


def interpreters(nodes: list[Node]) -> Finding:
    """Compare every node's ``python`` with this one: Ray needs equal versions."""
    want = [platform.python_version(), f"ray {importlib.metadata.version('ray')}"]
    said = sorted({node.python for node in nodes if node.python})
    bad = [text for text in said if not all(word in text for word in want)]
    fix = f"activate the environment ({', '.join(want)}) before ray start" if bad else ""
    return Finding("interpreter", "; ".join(said) or "no node answered", fix)


if __name__ == "__main__":
    main(run)
