"""Faults within one process: damage, numbers that are none, memory, disk, a stop, a notice."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe.network import Network
from pipeline import checkpoint, loop
from pipeline.checkpoint import CheckpointError
from pipeline.config.overrides import flatten
from pipeline.context import Session, Signal
from pipeline.loop import NonFiniteError, RoomError, Stopped
from tests.fault.faults import (
    ROOT,
    TINY,
    StopError,
    after,
    assert_same_weights,
    die,
    leftovers,
    run,
    steps,
)

pytestmark = pytest.mark.usefixtures("cheap_ending")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Network]:
    """The networks that are built, as they are built: what a fault is put into."""
    made: list[Network] = []
    build = checkpoint.build_model

    def recorded(*given: object) -> Network:
        made.append(build(*given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(checkpoint, "build_model", recorded)
    return made


def assert_goes_on(folder: Path, straight: Path) -> None:
    """What a fault left is whole, and the run that goes on ends as if nothing had been."""
    assert leftovers(folder) == []
    run(TINY, folder)
    assert leftovers(folder) == []
    assert_same_weights(folder, straight)


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "meta.json"])
def test_damaged_newest_checkpoint_costs_the_updates_since_the_one_before(
    tmp_path: Path, straight: Path, file: str
) -> None:
    with pytest.raises(StopError):
        run(TINY, tmp_path, after("epoch", 2, die))
    assert steps(tmp_path) == [4, 8]
    path = tmp_path / "checkpoints" / "step_00000008" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    events = run(TINY, tmp_path)
    (warning,) = [event["text"] for event in events if event["kind"] == "warning"]
    assert "step_00000008" in warning
    assert file in warning
    assert next(event["step"] for event in events if event["kind"] == "progress") == 1
    assert_same_weights(tmp_path, straight)
    assert leftovers(tmp_path) == []


def test_nan_in_a_gradient_ends_the_run_and_keeps_the_checkpoint_before_it(
    tmp_path: Path, straight: Path, models: list[Network]
) -> None:
    def poison() -> None:
        weight = next(models[0].body.parameters())
        weight.register_hook(lambda slope: slope * float("nan"))

    with pytest.raises(NonFiniteError, match=r"step 6: gradient norm of experts is nan"):
        run(TINY, tmp_path, after("progress", 5, poison))
    assert steps(tmp_path) == [4]
    assert all(
        w.isfinite().all()
        for w in checkpoint.load_model(tmp_path / "checkpoints" / "step_00000004")
        .state_dict()
        .values()
    )
    assert_goes_on(tmp_path, straight)


def test_collapsed_router_is_warned_of_and_tagged_and_the_run_goes_on(
    tmp_path: Path, models: list[Network]
) -> None:
    def collapse(event: object) -> None:
        if models and models[0].router is not None:  # in eval mode, all scores favour expert 0
            balance: torch.nn.BatchNorm1d = models[0].router.balance  # type: ignore[assignment]
            assert balance.running_mean is not None
            balance.running_mean.copy_(torch.tensor([-1e3, 1e3]))

    events = run(TINY, tmp_path, collapse)
    texts = [event["text"] for event in events if event["kind"] == "warning"]
    assert "sends 100.0% of the validation images to expert 0: it has collapsed" in texts[0]
    assert {"kind": "tag", "key": "router_collapsed", "value": "true"} in events
    assert steps(tmp_path) == [8, 12]


def refuse_as_a_gpu_does() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def ask_for_more_than_there_is() -> None:
    torch.empty(2**46, dtype=torch.uint8)


@pytest.mark.parametrize("trouble", [refuse_as_a_gpu_does, ask_for_more_than_there_is])
def test_batch_that_does_not_fit_ends_the_run_with_what_helps(
    tmp_path: Path, straight: Path, models: list[Network], trouble: Callable[[], None]
) -> None:
    def fill() -> None:
        models[0].register_forward_pre_hook(
            lambda model, given: trouble() if model.training and len(given[0]) > 8 else None
        )

    with pytest.raises(
        RoomError,
        match=r"update 6: out of memory with 20 images on a worker; a "
        r"smaller batch_size, or more workers",
    ):
        run(TINY, tmp_path, after("progress", 5, fill))
    assert steps(tmp_path) == [4]
    assert_goes_on(tmp_path, straight)


def test_other_errors_of_a_batch_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="something else"), loop.roomy(1, 2):
        raise RuntimeError("something else")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    libc, folder = ctypes.CDLL(None, use_errno=True), tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"none", bytes(folder), b"tmpfs", 0, b"size=4m") != 0:
        pytest.skip(f"no right to mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(bytes(folder), 2)


def test_full_disk_ends_the_run_and_keeps_the_checkpoint_before_it(
    small_disk: Path, straight: Path
) -> None:
    filler, folder = small_disk / "filler", small_disk / "run"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    with pytest.raises(
        CheckpointError, match=r"step_00000008 cannot be written: .*\(0\.0 MiB free there\)"
    ):
        run(TINY, folder, after("progress", 6, fill))
    assert steps(folder) == [4]
    filler.unlink()
    assert_goes_on(folder, straight)


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from pipeline.checkpoint import CheckpointError
from pipeline.config import read
from pipeline.loop import fit
from pipeline.context import Session
torch.set_num_threads(1)
seen = 0
def emit(event):
    global seen
    seen += event["kind"] == "progress"
    if seen == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    fit(read(json.loads(sys.argv[1])), Path(sys.argv[2]), Session(emit=emit))
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def test_limit_on_the_size_of_files_does_the_same(tmp_path: Path, straight: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(flatten(TINY)), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 7, finished.stderr
    assert "step_00000008 cannot be written: " in finished.stdout
    assert steps(tmp_path) == [4]
    assert_goes_on(tmp_path, straight)


# What the run is asked for


class Asked:
    """Is asked for something at one update; remembers that it was asked whether a node goes."""

    def __init__(self, signal: Signal, update: int):
        self.wanted, self.left, self.looks = signal, update, 0

    def signal(self) -> Signal:
        self.left -= 1
        return self.wanted if self.left == 0 else Signal.NONE

    def notice(self) -> bool:
        self.looks += 1
        return True


@pytest.mark.parametrize("update", [1, 6, 8, 12])  # 8 and 12 end an epoch
def test_stop_makes_a_checkpoint_of_that_very_update(
    tmp_path: Path, straight: Path, update: int
) -> None:
    asked = Asked(Signal.STOP, update)
    with pytest.raises(Stopped, match=r"stopped after epoch \d, update \d"):
        run(TINY, tmp_path, signal=asked.signal)
    assert steps(tmp_path)[-1] == update
    assert_goes_on(tmp_path, straight)


def test_notice_makes_a_checkpoint_of_that_update_and_the_run_goes_on(
    tmp_path: Path, straight: Path
) -> None:
    asked = Asked(Signal.LOOK, 6)
    seen: list[list[int]] = []
    run(
        TINY,
        tmp_path,
        after("progress", 7, lambda: seen.append(steps(tmp_path))),
        signal=asked.signal,
        notice=asked.notice,
    )
    assert asked.looks == 1
    assert seen == [[4, 6]]
    assert_same_weights(tmp_path, straight)


def test_nobody_looks_for_notices_unasked(tmp_path: Path) -> None:
    asked = Asked(Signal.SAVE, 2)
    with pytest.raises(StopError):
        run(TINY, tmp_path, after("progress", 3, die), signal=asked.signal, notice=asked.notice)
    assert (asked.looks, steps(tmp_path)) == (0, [2])
    assert Session().asked() is Signal.NONE
