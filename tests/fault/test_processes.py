"""Processes of a run that are killed or starved, as a user meets it: on Ray, with MLflow."""

from __future__ import annotations

import resource
import signal

import pytest

from tests.fault.faults import (
    WORDS,
    Command,
    assert_same_weights,
    await_end,
    descendants,
    kill,
    leftovers,
    steps,
    undisturbed,
)

TRAIN = "pipeline.train"
ONE = [*WORDS, "name=tiny", "workers=1", "epochs=6", "checkpoint_steps=3"]  # 7 updates an epoch
EPOCHS = [7, 14, 21, 28, 35, 42]


def finishes(command: Command) -> str:
    """The run ends as one that nobody disturbed, with one record in MLflow; return its lines."""
    code, out = command.run(TRAIN, *ONE)
    assert code == 0, out
    assert "continues after" in out
    folder = command.folder("tiny")
    assert_same_weights(folder, undisturbed(command.home / "undisturbed", "quickstart", *ONE))
    assert leftovers(folder) == []
    ((status, tags, told),) = command.runs().values()
    assert (status, tags["status"], told) == ("FINISHED", "finished", EPOCHS)
    return out


def test_killed_worker_costs_nothing_but_time(command: Command) -> None:
    process = command.start(TRAIN, *ONE)
    command.wait_for(lambda: len(command.checkpoints()) > 1)
    everything = descendants(process.pid)
    (worker,) = descendants(process.pid, "ray::RayTrainWorker")
    kill(worker)
    code, out = command.end(process)
    assert code == 0, out
    assert "continues after" in out
    folder = command.folder("tiny")
    assert_same_weights(folder, undisturbed(command.home / "undisturbed", "quickstart", *ONE))
    assert leftovers(folder) == []
    await_end(everything)
    ((status, _, told),) = command.runs().values()
    assert (status, told) == ("FINISHED", EPOCHS)


@pytest.mark.slow
def test_killed_driver_leaves_no_process_and_the_same_command_goes_on(command: Command) -> None:
    process = command.start(TRAIN, *ONE)
    command.wait_for(lambda: len(command.checkpoints()) > 1)
    everything = descendants(process.pid)
    assert len(everything) > 5
    kill(process.pid)
    process.wait()
    await_end(everything)
    finishes(command)


@pytest.mark.slow
def test_sigterm_makes_a_checkpoint_and_the_exit_code_says_that_it_goes_on(
    command: Command,
) -> None:
    process = command.start(TRAIN, *ONE)
    command.wait_for(lambda: len(command.checkpoints()) > 1)
    everything = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as ``ray job stop`` and a grid do it
    code, out = command.end(process)
    assert code == 75, out
    (stopped,) = [line for line in out.splitlines() if line.startswith("stopped after epoch ")]
    epoch, update = (int(word.strip(",")) for word in stopped.split()[3::2])
    assert steps(command.folder("tiny"))[-1] == 7 * epoch + update
    assert leftovers(command.folder("tiny")) == []
    await_end(everything)
    ((status, tags, _),) = command.runs().values()
    assert (status, tags["status"]) == ("KILLED", "preempted")
    assert f"continues after epoch {epoch}" in finishes(command)


@pytest.mark.slow
def test_disk_that_is_full_for_a_worker_ends_the_run_and_space_lets_it_go_on(
    command: Command,
) -> None:
    process = command.start(TRAIN, *ONE)
    command.wait_for(lambda: len(command.checkpoints()) > 1)
    everything = descendants(process.pid)
    (worker,) = descendants(process.pid, "ray::RayTrainWorker")
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    code, out = command.end(process)
    assert code == 1, out
    assert "cannot be written: " in out.splitlines()[-1]
    assert steps(command.folder("tiny"))
    assert leftovers(command.folder("tiny")) == []
    await_end(everything)
    ((status, tags, _),) = command.runs().values()
    assert (status, tags["status"]) == ("FAILED", "failed")
    finishes(command)


@pytest.mark.slow
def test_weights_that_explode_fail_the_run_with_step_and_quantity(command: Command) -> None:
    words = "algorithm=standard backbone.num_experts=1 lr=1e30 checkpoint_steps=1 workers=2".split()
    process = command.start(TRAIN, *WORDS, *words, "name=tiny", "epochs=2")
    code, out = command.end(process)
    assert code == 1, out
    assert out.splitlines()[-1].startswith("error: NonFiniteError: step 2: "), out
    folder = command.folder("tiny")
    assert steps(folder) == [1]
    assert leftovers(folder) == []
    ((status, tags, _),) = command.runs().values()
    assert (status, tags["status"]) == ("FAILED", "failed")
