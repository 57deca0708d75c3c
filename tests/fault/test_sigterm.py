"""SIGTERM leaves a driver the time that it needs to write down where it is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRIVER = """
import time
from pipeline.config import Config
from pipeline.distributed.cluster import ray_cluster, stoppable

with stoppable(), ray_cluster(Config(), lambda config: None):
    try:
        print("ready", flush=True)
        time.sleep(300)
    except KeyboardInterrupt:
        time.sleep(5)  # Ray's own handler would abort after three
        print("written", flush=True)
"""


def test_driver_is_not_aborted_while_it_writes(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
    )
    try:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line != "ready\n":
            pass
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert said.endswith("written\n")
    assert process.returncode == 0
