"""One cell in a process of its own: ``python -m pipeline.grid.cell_process``, for ``driver`` alone.

The first line of standard input is the request, as JSON: ``config`` (flat), ``tags``,
``strict``.
The rest of it never comes: its end means that the grid is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from pipeline.cli.arguments import PREEMPTED, fail, main
from pipeline.config import read
from pipeline.distributed.cluster import stoppable
from pipeline.distributed.driver import train


def run(_: list[str]) -> int:
    """Train the cell that standard input names; returns the exit code."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        with stoppable():
            return train(
                read(request["config"]), tags=request["tags"], strict=request.get("strict", False)
            )
    except (KeyboardInterrupt, SystemExit):
        return fail("stopped; the same command continues", PREEMPTED)


def stop_with_parent() -> None:
    """Stop this process as SIGTERM does, once the process that started it is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(run)
