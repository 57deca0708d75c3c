"""A run folder behind a URI is whole there at any moment, and comes back on another machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.algorithms.standard import Standard
from pipeline.config import Config
from pipeline.context import Session
from pipeline.data import files
from pipeline.data.files import Remote
from pipeline.data.synthetic import Synthetic
from pipeline.distributed.preflight import reachable
from pipeline.loop import fit
from pipeline.measures import Evaluation
from pipeline.storage import lease, object_store, sync
from pipeline.storage.lease import leased
from pipeline.storage.object_store import Bucket, StoreError
from pipeline.storage.run_folder import check_lasting, owned, run_folder, set_aside
from pipeline.storage.sync import Part, for_worker, home_of, listed, restore
from tests.helpers.servers import ObjectStore, wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    server = ObjectStore(tmp_path_factory.mktemp("s3") / "log").start()
    yield server
    server.stop()


@pytest.fixture(params=["file", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URI of an empty storage: a folder's, and one behind a server."""
    monkeypatch.setenv("ROBUST_MOE_SCRATCH", str(tmp_path / "scratch"))
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    for key, value in request.getfixturevalue("s3").environment.items():
        monkeypatch.setenv(key, value)
    files._filesystem.cache_clear()
    yield f"s3://bucket/{tmp_path.name}"
    files._filesystem.cache_clear()


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "REST", 3.0)
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    monkeypatch.setattr(lease, "POLL", 0.1)


def tiny(storage: str, **settings: Any) -> Config:
    return Config(
        dataset=Synthetic(size=8, train_images=64, test_images=8),
        algorithm=Standard(),
        backbone=replace(Config().backbone, ratio=0.125),
        evaluation=Evaluation(steps=1, validation_steps=1),
        batch_size=16,
        workers=1,
        storage=storage,
        **{"name": "tiny", "epochs": 3, **settings},
    )


def silent(_: str) -> None:
    pass


def put(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def held(folder: Path) -> dict[str, str]:
    """What a folder holds, less what is this node's own."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {p.as_posix(): (folder / p).read_text() for p in found if p.parts[0][0] != "."}


# Places


def test_folder_and_home_name_each_other(storage: str, tmp_path: Path) -> None:
    config = tiny(storage)
    folder = run_folder(config)
    assert folder.is_relative_to(tmp_path / "scratch")
    assert str(home_of(folder)) == f"{storage}/{config.experiment}/{folder.name}"
    assert home_of(run_folder(replace(config, storage=str(tmp_path)))) is None
    assert folder.name == run_folder(replace(config, storage=str(tmp_path))).name


def test_name_with_the_marks_of_a_uri_is_kept(storage: str, tmp_path: Path) -> None:
    folder = run_folder(tiny(storage, name="50% of a b?c#d"))
    put(folder, card="text")
    home = home_of(folder)
    assert home is not None
    Part(home, folder, "training").push()
    shutil.rmtree(folder)
    restore(folder, "training")
    assert held(folder) == {"card": "text"}
    assert folder.name in Bucket(Remote(storage)).files()[0]


def test_node_says_why_it_cannot_use_the_store(storage: str) -> None:
    bucket = Bucket(Remote(storage))
    assert reachable(bucket, "mark") == "does not see what the driver wrote there"
    bucket.write("mark", b"0")
    assert reachable(bucket, "mark") == ""
    assert bucket.files() == ["mark"], "nothing is left"


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("ftp://host/x", "got 'ftp://host/x'"),
        ("s3:///x", "such as s3://bucket/prefix"),
        ("s3://key:hunter2@bucket/x", "without user and query"),
        ("s3://bucket/x?endpoint_override=y", "without user and query"),
    ],
)
def test_uri_that_cannot_be_a_storage_is_refused_without_what_is_secret(uri: str, why: str) -> None:
    with pytest.raises(ValueError, match="storage must be") as caught:
        check_lasting(tiny(uri))
    assert why in str(caught.value)
    assert "hunter2" not in str(caught.value)


# Parts


def test_other_folder_gets_what_was_pushed_and_nothing_else(storage: str, tmp_path: Path) -> None:
    home, ours, theirs = Remote(f"{storage}/run"), tmp_path / "ours", tmp_path / "theirs"
    put(ours, checkpoints__step_1__state="1", plots__a="plot", run="", ray__x="Ray's")
    (ours / "run.json").write_text("tracking's")
    put(ours / "checkpoints" / ".draft", half="2")
    put(theirs, checkpoints__step_0__state="old", plots__a="other")
    assert Part(home, ours, "training").push()
    assert not Part(home, ours, "training").push(), "nothing is new"
    Part(home, theirs, "training").pull()
    assert held(theirs) == {"checkpoints/step_1/state": "1", "plots/a": "plot", "run": ""}
    assert not (theirs / "checkpoints" / "step_0").exists()


def test_equal_files_are_one_object_and_stale_ones_are_deleted(
    storage: str, tmp_path: Path
) -> None:
    home, ours = Remote(f"{storage}/run"), tmp_path / "ours"
    part = Part(home, ours, "training")
    put(ours, checkpoints__best__w="weights", checkpoints__step_1__w="weights")
    part.push()
    assert len(Bucket(home).files("training/objects")) == 1
    put(ours, checkpoints__step_1__w="others", checkpoints__best__w="others")
    part.push()
    (name,) = Bucket(home).files("training/objects")
    assert Bucket(home).read(name) == b"others"


@pytest.mark.parametrize("after", range(4))
def test_push_that_is_killed_anywhere_leaves_the_state_before(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The third write is the list; a fourth never comes, and the new state stands."""
    home, ours, theirs = Remote(f"{storage}/run"), tmp_path / "ours", tmp_path / "theirs"
    put(ours, checkpoints__step_1__w="1", checkpoints__step_1__s="2")
    Part(home, ours, "training").push()
    shutil.rmtree(ours)
    put(ours, checkpoints__step_2__w="3", checkpoints__step_2__s="4")
    real, count = Bucket.write, 0

    def write(self: Bucket, name: str, source: bytes | Path) -> str:
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        return real(self, name, source)

    with monkeypatch.context() as dying:
        dying.setattr(Bucket, "write", write)
        try:
            Part(home, ours, "training").push()
        except KeyboardInterrupt:
            assert after < 3
    Part(home, theirs, "training").pull()
    old = {"checkpoints/step_1/w": "1", "checkpoints/step_1/s": "2"}
    new = {"checkpoints/step_2/w": "3", "checkpoints/step_2/s": "4"}
    assert held(theirs) == (old if after < 3 else new)


def test_file_that_grows_while_it_is_uploaded_arrives_in_one_of_its_states(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, ours, theirs = Remote(f"{storage}/run"), tmp_path / "ours", tmp_path / "theirs"
    journal = ours / "journal.jsonl"
    put(ours, run="")
    journal.write_text("a")
    real = object_store.blocks

    def blocks(source: bytes | Path) -> Iterator[bytes]:
        if source == journal and len(text := journal.read_text()) < 4:
            journal.write_text(text + "a")
        yield from real(source)

    monkeypatch.setattr(object_store, "blocks", blocks)
    Part(home, ours, "tracking").push()
    Part(home, theirs, "tracking").pull()
    sent = held(theirs)["journal.jsonl"]
    assert sent
    assert journal.read_text().startswith(sent)


def test_journal_that_a_killed_driver_left_here_is_kept_unless_another_machine_went_on(
    storage: str, tmp_path: Path
) -> None:
    home, ours, theirs = Remote(f"{storage}/run"), tmp_path / "ours", tmp_path / "theirs"
    journal = ours / "journal.jsonl"
    put(ours, run="")
    journal.write_text("1\n")
    Part(home, ours, "tracking").push()
    journal.write_text("1\n2\n")
    Part(home, ours, "tracking").pull(keep_newer=True)
    assert journal.read_text() == "1\n2\n"
    put(theirs, run="")
    Part(home, theirs, "tracking").pull(keep_newer=True)
    (theirs / "journal.jsonl").write_text("1\n3\n")
    Part(home, theirs, "tracking").push()
    Part(home, ours, "tracking").pull(keep_newer=True)
    assert journal.read_text() == "1\n3\n"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a//b", "a/../../x", "a\\b", "", "checkpoints/.."]
)
def test_list_whose_names_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="damaged"):
        listed(json.dumps({name: "0" * 64}).encode(), Remote("s3://bucket/run"))
    assert listed(json.dumps({"a/b": "0" * 64}).encode(), Remote("s3://bucket/run"))


# Owners


@pytest.mark.usefixtures("brisk")
def test_second_start_is_refused_while_the_first_lives_and_gets_what_it_left(
    storage: str, tmp_path: Path
) -> None:
    home, said = Remote(f"{storage}/run"), list[str]()
    with leased(home, tmp_path / "a", silent, 60) as first:
        assert first
        (tmp_path / "a" / "run.json").write_text("ours")
        with leased(home, tmp_path / "b", said.append, 4.5) as second:  # longer than REST
            assert not second
        assert "waits for it" in said[0]
        wait_until(lambda: bool(Bucket(home).read("tracking/list.json")), 10)
    with leased(home, tmp_path / "b", silent, 60) as second:
        assert second
        assert held(tmp_path / "b") == {"run.json": "ours"}


@pytest.mark.usefixtures("brisk")
def test_of_two_starts_at_once_one_is_the_owner(storage: str, tmp_path: Path) -> None:
    home, free, over = Remote(f"{storage}/run"), list[bool](), threading.Event()

    def start(name: str) -> None:
        with leased(home, tmp_path / name, silent, 2.0) as ours:
            free.append(ours)
            if ours:
                over.wait(30)

    both = [threading.Thread(target=start, args=(name,)) for name in "ab"]
    for thread in both:
        thread.start()
    wait_until(lambda: len(free) == 2, 30)
    over.set()
    for thread in both:
        thread.join()
    assert sorted(free) == [False, True]


@pytest.mark.usefixtures("brisk")
def test_owner_that_was_killed_is_followed_at_once_here_and_after_a_rest_elsewhere(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Remote(f"{storage}/run")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    for host, least in ((lease.platform.node(), 0.0), ("another", lease.REST)):
        owner = {"token": "t", "host": host, "boot": lease.boot(), "pid": int(dead.stdout)}
        Bucket(home).write("owner.json", json.dumps(owner).encode())
        began = time.monotonic()
        with leased(home, tmp_path / "a", silent, 60) as free:
            assert free
            assert time.monotonic() - began >= least


@pytest.mark.usefixtures("brisk")
def test_worker_of_an_owner_that_lost_its_run_writes_nothing_more(storage: str) -> None:
    folder = run_folder(tiny(storage))
    home = home_of(folder)
    assert home is not None
    lease.sign(home, "first", 0)
    push = for_worker(folder)
    assert push is not None
    put(folder, checkpoints__step_1__w="1")
    push()
    lease.sign(home, "second", 0)
    put(folder, checkpoints__step_2__w="2")
    with pytest.raises(StoreError, match="another process has taken over"):
        push()
    assert list(Part(home, folder, "training").listed()) == ["checkpoints/step_1/w"]


def test_store_that_is_away_for_a_while_costs_no_checkpoint(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fails = run_folder(tiny(storage)), 2
    push, real = for_worker(folder), Bucket.write
    assert push is not None

    def write(self: Bucket, name: str, source: bytes | Path) -> str:
        nonlocal fails
        if fails:
            fails -= 1
            raise StoreError("away")
        return real(self, name, source)

    monkeypatch.setattr(sync, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Bucket, "write", write)
    put(folder, checkpoints__step_1__w="1")
    push()
    fails = 99
    put(folder, checkpoints__step_2__w="2")
    with pytest.raises(StoreError, match="away"):
        push()
    fails = 0
    shutil.rmtree(folder)
    restore(folder, "training")
    assert held(folder) == {"checkpoints/step_1/w": "1"}


@pytest.mark.usefixtures("brisk")
def test_fresh_start_leaves_the_earlier_run_under_another_name(storage: str) -> None:
    folder = run_folder(tiny(storage))
    with owned(folder, silent) as free:
        assert free
        put(folder, checkpoints__step_1__w="1", card="")
        (folder / "run.json").write_text("old")
        restore_push(folder)
    with owned(folder, silent):
        aside = set_aside(folder)
        assert aside is not None
        (folder / "x").parent.mkdir()
        (folder / "run.json").write_text("new")
    shutil.rmtree(folder.parent)
    for name in ("tracking", "training"):
        restore(folder, name)
        restore(aside, name)
    assert held(folder) == {"run.json": "new"}
    assert held(aside) == {"run.json": "old", "checkpoints/step_1/w": "1", "card": ""}


def restore_push(folder: Path) -> None:
    home = home_of(folder)
    assert home is not None
    Part(home, folder, "training").push()


# Runs


class Interrupted(Exception):  # noqa: N818
    pass


def train(config: Config, *, stop_after: int = 99) -> Path:
    """Train as a worker does, on whatever the home holds, for some epochs."""
    folder = run_folder(config)
    push = for_worker(folder)
    assert push is not None
    epochs = 0

    def report(_: object) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == stop_after:
            raise Interrupted

    fit(config, folder, Session(kept=push, report=report))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(folder / "checkpoints")[0]
    assert found is not None
    return dict(load_file(found / "model.safetensors"))


def test_run_whose_scratch_is_lost_goes_on_from_the_store_and_ends_equal(
    storage: str, tmp_path: Path
) -> None:
    config = tiny(storage)
    fit(config, tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train(config, stop_after=2)
    shutil.rmtree(tmp_path / "scratch")
    told = list[dict[str, Any]]()
    folder = run_folder(config)
    push = for_worker(folder)
    assert push is not None
    fit(config, folder, Session(kept=push, emit=lambda event: told.append(dict(event))))
    (resumed,) = [event for event in told if event["kind"] == "resumed"]
    assert resumed["epoch"] == 2, "nothing is lost that was pushed"
    mine, whole = weights(folder), weights(tmp_path / "undisturbed")
    assert mine.keys() == whole.keys()
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    shutil.rmtree(tmp_path / "scratch")
    restore(folder, "training")
    assert checkpoint.verify(folder / "checkpoints" / "best")
    assert (folder / "card.md").is_file()
    assert list((folder / "plots").glob("*.png"))


def test_damaged_newest_checkpoint_in_the_store_is_refused_and_the_one_before_is_used(
    storage: str, tmp_path: Path
) -> None:
    config = tiny(storage)
    with pytest.raises(Interrupted):
        train(config, stop_after=2)
    folder = run_folder(config)
    home = home_of(folder)
    assert home is not None
    listed = Part(home, folder, "training").listed()
    newest = sorted(name for name in listed if name.startswith("checkpoints/step_"))[-1]
    step = newest.split("/")[1]
    there, target = Bucket(home), f"training/objects/{listed[f'checkpoints/{step}/state.pt']}"
    state = there.read(target)
    assert state is not None
    there.write(target, state[:-1] + bytes([state[-1] ^ 1]))
    shutil.rmtree(tmp_path / "scratch")
    told = list[dict[str, Any]]()
    push = for_worker(folder)
    assert push is not None
    fit(config, folder, Session(kept=push, emit=lambda event: told.append(dict(event))))
    (warning,) = [e["text"] for e in told if e["kind"] == "warning" and "damaged" in e["text"]]
    assert f"{step} is damaged: state.pt has sha256" in warning
    assert "the one before it is used" in warning
    (resumed,) = [event for event in told if event["kind"] == "resumed"]
    assert resumed["epoch"] == 1


@pytest.mark.slow
def test_command_goes_on_from_the_store_after_the_machine_is_lost(
    tmp_path: Path, s3: ObjectStore
) -> None:
    """Stopped by SIGTERM after a checkpoint, its scratch deleted; then finished; then shown."""
    words = "dataset=synthetic dataset.size=8 dataset.train_images=256 dataset.test_images=32 "
    words += "backbone.ratio=0.125 batch_size=32 evaluation.steps=2 evaluation.validation_steps=1 "
    words += "epochs=12 workers=1 name=lost"
    command = [sys.executable, "-m", "pipeline.train", *words.split()]
    environment = {
        **os.environ,
        **s3.environment,
        "PYTHONPATH": str(ROOT),
        "ROBUST_MOE_SCRATCH": str(tmp_path / "scratch"),
        "OMP_NUM_THREADS": "1",
    }

    def start(*more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*command, *more],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    first = start("storage=s3://bucket/lost")
    wait_until(lambda: any((tmp_path / "scratch").rglob("step_*/meta.json")), 240)
    time.sleep(1.0)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=240)[0]
    assert first.returncode != 0, said
    shutil.rmtree(tmp_path / "scratch")
    second = start("storage=s3://bucket/lost")
    said = second.communicate(timeout=400)[0]
    assert second.returncode == 0, said
    assert "resumed" in said or "continues" in said, said
    shutil.rmtree(tmp_path / "scratch")
    third = start("storage=s3://bucket/lost")
    said = third.communicate(timeout=240)[0]
    assert third.returncode == 0, said
    assert "this run is finished" in said
    plain = start(f"storage={tmp_path}/runs")
    assert plain.communicate(timeout=400)
    for folder in (tmp_path / "scratch").rglob("lost-*"):
        if folder.is_dir():
            restore_from(folder, s3)
            break
    (undisturbed,) = (tmp_path / "runs" / "robust-moe").glob("lost-*")
    mine, whole = weights(folder), weights(undisturbed)
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def restore_from(folder: Path, server: ObjectStore) -> None:
    """Fetch a run's checkpoints in this process."""
    with pytest.MonkeyPatch.context() as here:
        for key, value in server.environment.items():
            here.setenv(key, value)
        files._filesystem.cache_clear()
        restore(folder, "training")
    files._filesystem.cache_clear()
