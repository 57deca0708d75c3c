"""The Ray cluster of a command: joined by its address, or started and stopped with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.cli.arguments import ENVIRONMENT
from pipeline.config import Config
from pipeline.distributed.address import check_address
from pipeline.distributed.preflight import preflight


@contextmanager
def ray_cluster(
    config: Config, check: Callable[[Config], None] = preflight, *, dashboard: bool = False
) -> Iterator[None]:
    """Join the cluster of ``RAY_ADDRESS``, or start a Ray of our own that ends with the block.

    Args:
        dashboard: Whether a Ray of our own has one. Train frees the workers of a run that was
            stopped from outside through it.

    Raises:
        ValueError: The run cannot work there, says ``check``, or the address is no cluster's.
        ConnectionError: No Ray is there.
    """
    import ray
    from ray._private import worker

    check_address()
    keys = [k for k in ENVIRONMENT if k.startswith("RAY_TRAIN")]
    passed = {k: os.environ[k] for k in keys if k in os.environ}
    for key in ("ROBUST_MOE_DATA", "ROBUST_MOE_CACHE"):
        if key in os.environ:
            passed[key] = absolute(os.environ[key])
    passed.setdefault("ROBUST_MOE_DATA", str(Path("data").resolve()))
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    passed["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    address = os.environ.get("RAY_ADDRESS") or "local"
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=address,
        runtime_env={"env_vars": passed},
        log_to_driver=False,
        logging_level="ERROR",
        **({"include_dashboard": dashboard} if address == "local" else {}),
    )
    # no public setting: log_to_driver=False lets a lost node's dump through
    worker._worker_logs_enabled = False
    if threading.current_thread() is threading.main_thread() and callable(handler):
        # Ray's own aborts the process 3 s after SIGTERM, whatever it is writing down
        signal.signal(signal.SIGTERM, handler)
    try:
        check(config)
        yield
    finally:
        ray.shutdown()


def absolute(folder: str) -> str:
    """Make a folder's name one that holds in any working directory; a URI does already."""
    return folder if "://" in folder else str(Path(folder).expanduser().resolve())


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
