"""What must hold before a run starts on a cluster, so that it ends with a line and not a hang."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.worker_range import ends
from pipeline.data.files import Remote
from pipeline.storage.object_store import Bucket, StoreError
from pipeline.storage.sync import storage_root

PATIENCE = 180.0  # seconds that nodes have to answer; each starts a process for it
LEAST_FREE = 0.06  # share of a disk: Ray stops making objects when 5% are left
VERSIONS = (
    "import importlib.metadata as m, platform; "
    "print(platform.python_version(), *(f'{n} {m.version(n)}' for n in ('ray', 'torch')), sep=', ')"
)


@dataclass(frozen=True)
class Node:
    """What one node says of itself; empty texts are good.

    Attributes:
        host: Its address.
        silent: Why it says nothing: then the rest is empty.
        storage: Why the run folders' folder cannot be used from there.
        disk: Which disk is nearly full.
        python: Its version, and those of ray and torch of the ``python`` in its PATH.
    """

    host: str
    silent: str = ""
    storage: str = ""
    disk: str = ""
    python: str = ""


def preflight(config: Config) -> None:
    """Check resources, and storage from every node, of the Ray that this process has joined.

    A node that does not answer in time does not speak against the run: it may only be busy.

    Raises:
        ValueError: A run cannot work here; the message names what, where and the fix.
    """
    if problem := shortage(config.workers, capacity()):
        raise ValueError(problem)
    if len(alive()) < 2:
        return  # this process writes the run folder itself, and says so if it cannot
    problems = [f"{node.host}: {node.storage}" for node in survey(config.storage) if node.storage]
    if problems:
        raise ValueError(
            f"storage must be a folder that all nodes share and may write, got {config.storage!r} "
            f"({'; '.join(problems[:3])})"
        )


def capacity() -> dict[str, float]:
    """Count what the cluster has, or may have: ``ROBUST_MOE_CAPACITY``, such as ``CPU=64,GPU=8``.

    Ray does not tell what its autoscaler may start, so where there is one its configuration sets
    this for the head. Train would otherwise see a cluster at rest and call it too small.
    """
    import ray

    found = {str(key): float(value) for key, value in ray.cluster_resources().items()}
    for item in filter(None, os.environ.get("ROBUST_MOE_CAPACITY", "").split(",")):
        key, _, value = item.partition("=")
        try:
            found[key.strip()] = max(found.get(key.strip(), 0.0), float(value))
        except ValueError:
            raise ValueError(
                f"ROBUST_MOE_CAPACITY must be like CPU=64,GPU=8, got {item!r}"
            ) from None
    return found


def shortage(workers: int, has: Mapping[str, float]) -> str:
    """Say what a run of so many workers lacks; empty: nothing."""
    if (cpus := has.get("CPU", 0)) < ends(workers)[0]:
        return f"workers must be at most the cluster's {cpus:.0f} CPUs, got {workers}"
    return ""


def dashboard_url() -> str:
    """Return the dashboard URL of the Ray that this process has joined; empty: there is none."""
    import ray

    found = ray.init(ignore_reinit_error=True).dashboard_url if ray.is_initialized() else ""
    return f"http://{found}" if found else ""


def alive() -> list[dict[str, Any]]:
    """List the nodes that answer."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def survey(storage: str, *, versions: bool = False) -> list[Node]:
    """Let every node look at the storage and its disk; this one too, and ask for versions or not.

    A mark that this process writes tells a shared folder from another one of the same name.
    """
    folder, mark = storage_root(storage), f".preflight-{uuid.uuid4().hex}"
    bucket = Bucket(Remote(storage.rstrip("/"))) if "://" in storage else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark).touch()
        if bucket:
            bucket.write(mark, b"0")
    except (OSError, StoreError) as error:
        reason = f"cannot be written: {error.strerror}" if isinstance(error, OSError) else error
        return [Node("here", storage=str(reason), disk=full(folder))]
    try:
        return everywhere(lambda: look(str(folder), mark, versions, bucket))
    finally:
        (folder / mark).unlink(missing_ok=True)
        if bucket:
            bucket.delete(mark)


def everywhere(task: Callable[[], Node]) -> list[Node]:
    """Call a function once on every node, and wait for all of them at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    hosts = {}
    for node in alive():
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        hosts[remote.options(scheduling_strategy=pinned).remote()] = node
    ready, _ = ray.wait(list(hosts), num_returns=len(hosts), timeout=PATIENCE)
    found = []
    for reference, node in hosts.items():
        host = node["NodeManagerAddress"]
        if reference not in ready:
            found.append(Node(host, silent=f"no answer in {PATIENCE:.0f} s"))
            continue
        try:
            found.append(ray.get(reference))
        except Exception as error:  # the node left, or cannot import the project
            if node["NodeID"] not in {other["NodeID"] for other in alive()}:
                continue
            reason = [line for line in str(error).splitlines() if line.strip()][-1:]
            found.append(Node(host, silent=f"cannot run a task: {' '.join(reason)}"))
    return found


def look(folder: str, mark: str, versions: bool, bucket: Bucket | None = None) -> Node:
    """Look around on the node where this runs."""
    import ray

    return Node(
        host=ray.util.get_node_ip_address(),
        storage=reachable(bucket, mark) if bucket else usable(Path(folder), mark),
        disk=" and ".join(filter(None, map(full, disks(Path(folder))))),
        python=interpreter() if versions else "",
    )


def usable(folder: Path, mark: str) -> str:
    """Say why the driver's folder cannot be used from here; empty: it can."""
    if not (folder / mark).exists():
        return "does not see what the driver wrote there"
    own = folder / f"{mark}-{platform.node()}-{os.getpid()}"
    try:
        own.write_bytes(b"0")
        own.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def reachable(bucket: Bucket, mark: str) -> str:
    """Say why the object store cannot be used from here; empty: it can."""
    own = f"{mark}-{platform.node()}-{os.getpid()}"
    try:
        if bucket.read(mark) is None:
            return "does not see what the driver wrote there"
        bucket.write(own, b"0")
        bucket.delete(own)
    except StoreError as error:
        return str(error)
    return ""


def disks(folder: Path) -> Iterable[Path]:
    """List what fills up: run folders, and Ray's own files."""
    import tempfile

    return folder, Path(tempfile.gettempdir())


def full(folder: Path) -> str:
    """Say that the disk of a folder is nearly full; empty: it is not."""
    while not folder.exists():
        folder = folder.parent
    total, _, free = shutil.disk_usage(folder)
    if free < LEAST_FREE * total:
        return f"{folder} has {free / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    return ""


def interpreter() -> str:
    """Ask the ``python`` of this node's PATH, which runs what is submitted, for its versions."""
    if not (python := shutil.which("python")):
        return "no python in its PATH"
    try:
        found = subprocess.run(
            [python, "-c", VERSIONS], capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired:
        return f"{python}: no answer in 60 s"
    lines = (found.stdout if found.returncode == 0 else found.stderr).strip().splitlines()
    return f"{python}: {lines[-1] if lines else f'exit code {found.returncode}'}"
