"""Several Ray nodes on one machine, in a process of their own: what tests add, drain and kill.

Run as a script it holds the nodes and reads from standard input: ``add CPUS``, ``kill NUMBER``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fault.faults import ROOT, await_end, descendants, title

OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


class Nodes:
    """A head without CPUs, and nodes that come and go."""

    def __init__(self, log: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.nodes"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | OPEN,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
        )
        self.address = self._answer()
        self.ids: list[str] = []
        self.raylets: list[int] = []

    def add(self, cpus: int = 1) -> int:
        """Start a node; return its number."""
        node, raylet = self._ask(f"add {cpus}").split()
        self.ids.append(node)
        self.raylets.append(int(raylet))
        return len(self.ids) - 1

    def kill(self, number: int) -> None:
        """Kill a node's raylet, and with it all that runs there."""
        gone = descendants(self.raylets[number])
        self._ask(f"kill {number}")
        await_end(gone)

    def drain(self, number: int, seconds: int) -> None:
        """Announce that a node will be taken away, as the cloud's notice does."""
        words = f"drain-node --address {self.address} --node-id {self.ids[number]} --reason "
        words += "DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds"
        command = [sys.executable, "-m", "ray.scripts.scripts", *words.split(), str(seconds)]
        subprocess.run(command, check=True, env=os.environ | OPEN, capture_output=True)

    def workers(self) -> dict[int, list[int]]:
        """Processes of Ray Train's workers on each node that is alive."""
        return {
            number: [pid for pid in descendants(raylet) if "RayTrainWorker" in title(pid)]
            for number, raylet in enumerate(self.raylets)
            if title(raylet)
        }

    def close(self) -> None:
        """End all nodes; fail if a process of theirs stays."""
        below = descendants(self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        await_end(below)

    def _ask(self, words: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("answer "):  # Ray says things too
                return line.removeprefix("answer ").strip()
        raise AssertionError("the nodes' process has ended")


def hold() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = []
    print("answer", cluster.address, flush=True)
    for line in sys.stdin:
        word, number = line.split()
        if word == "add":
            nodes.append(node := cluster.add_node(num_cpus=int(number)))
            (raylet,) = node.all_processes["raylet"]
            print("answer", node.node_id, raylet.process.pid, flush=True)
        else:
            cluster.remove_node(nodes[int(number)], allow_graceful=False)
            print("answer gone", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    hold()
