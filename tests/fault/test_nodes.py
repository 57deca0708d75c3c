"""Nodes that are lost, announce that they go, and come: one machine, several Ray nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.faults import (
    WORDS,
    Command,
    assert_same_weights,
    leftovers,
    undisturbed,
)
from tests.fault.nodes import OPEN, Nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TRAIN = "pipeline.train"
EPOCHS = 20
SLOW = f"algorithm.attack.steps=16 epochs={EPOCHS} checkpoint_steps=3"  # so that events find it


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path / "nodes.txt")
    yield made
    made.close()


@pytest.fixture
def command(tmp_path: Path, nodes: Nodes) -> Iterator[Command]:
    """Commands that join the nodes' cluster."""
    made = Command(
        tmp_path,
        RAY_ADDRESS=nodes.address,
        RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1",
        **OPEN,
    )
    yield made
    made.close()


def busy(nodes: Nodes) -> list[int]:
    """The nodes that have workers."""
    return [number for number, pids in nodes.workers().items() if pids]


def test_run_outlives_a_node_that_was_announced_to_go_and_one_that_was_not(
    command: Command, nodes: Nodes
) -> None:
    words = [*WORDS, *SLOW.split(), "name=tiny", "workers=1"]
    for _ in range(2):
        nodes.add()
    process = command.start(TRAIN, *words)
    command.wait_for(lambda: command.checkpoints() and busy(nodes))
    (first,) = busy(nodes)
    nodes.drain(first, 600)
    command.wait_for(lambda: "is about to be taken away" in command.log.read_text())
    kept = set(command.checkpoints())
    command.wait_for(lambda: set(command.checkpoints()) - kept)
    nodes.kill(first)
    command.wait_for(lambda: command.log.read_text().count("continues after") == 1)
    command.wait_for(lambda: busy(nodes))
    (second,) = busy(nodes)
    assert second != first
    nodes.add()
    nodes.kill(second)
    code, out = command.end(process)
    assert code == 0, out
    assert out.count("continues after") == 2
    assert "raylet" not in out, "Ray's own words stay in its logs"
    folder = command.folder("tiny")
    assert leftovers(folder) == []
    ((status, _, told),) = command.runs().values()
    assert (status, told) == ("FINISHED", list(range(7, 7 * EPOCHS + 1, 7)))
    assert_same_weights(folder, undisturbed(command.home / "undisturbed", "quickstart", *words))


def test_elastic_run_goes_on_with_fewer_workers_and_takes_back_more(
    command: Command, nodes: Nodes
) -> None:
    words = [*WORDS, *SLOW.split(), "name=tiny", "workers=1..2"]
    for _ in range(2):
        nodes.add()

    def said(text: str) -> int:
        return command.log.read_text().count(text)

    process = command.start(TRAIN, *words)
    command.wait_for(lambda: command.checkpoints() and len(busy(nodes)) == 2)
    assert said("2 of 1..2 worker(s)") == 1
    nodes.kill(busy(nodes)[1])
    command.wait_for(lambda: said("1 of 1..2 worker(s)"))
    command.wait_for(lambda: said("continues after") == 1)
    nodes.add()
    command.wait_for(lambda: said("2 of 1..2 worker(s)") == 2)
    code, out = command.end(process)
    assert code == 0, out
    assert "workers were lost: " in out
    assert out.count("stopped after epoch") == 1, "to take one more in it made a checkpoint"
    assert out.count("continues after") == 2
    assert leftovers(command.folder("tiny")) == []
    ((status, tags, told),) = command.runs().values()
    assert (status, told) == ("FINISHED", list(range(7, 7 * EPOCHS + 1, 7)))
    assert tags["workers_now"] == "2"


def test_four_cells_on_three_nodes_of_which_one_is_killed_all_finish(
    command: Command, nodes: Nodes
) -> None:
    for _ in range(3):
        nodes.add(2)
    words = "backbone=small backbone.ratio=0.125 dataset=synthetic algorithm=s_dense epochs=8 "
    words += "precision=fp32 algorithm.attack.steps=12 checkpoint_steps=3 seed=0,1,2,3 at_once=4"
    small = [word for word in WORDS if word != "dataset=synthetic"]
    process = command.start("pipeline.grid", *words.split(), *small)
    command.wait_for(lambda: sum(map(len, nodes.workers().values())) == 4)
    command.wait_for(lambda: len(command.checkpoints()) >= 4)
    nodes.kill(busy(nodes)[-1])
    code, out = command.end(process)
    assert code == 0, out
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{command.home}/mlflow.db")
    (where,) = [e.experiment_id for e in client.search_experiments() if e.name == "robust-moe"]
    records = client.search_runs([where])
    cells = [record for record in records if "mlflow.parentRunId" in record.data.tags]
    assert [record.info.status for record in records] == ["FINISHED"] * 5
    assert len(cells) == 4
    for record in cells:
        told = client.get_metric_history(record.info.run_id, "val/ra")
        assert [metric.step for metric in told] == list(range(7, 57, 7))
    logs = [path.read_text() for path in (command.home / "runs").rglob("logs/*.log")]
    assert sum("continues after" in log for log in logs) >= 1, "the node had none of them"
    print(out, *logs, sep="\n\n")
