"""A number of workers that may change: how it is written, and what it must not change."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import end_of_run, loop
from pipeline.config import Config, read
from pipeline.config.overrides import flatten, override
from pipeline.config.worker_range import Elastic, counts, ends, read_workers
from pipeline.context import Session, Signal
from pipeline.data.splits import Images, Share
from pipeline.distributed.preflight import shortage
from pipeline.loop import Stopped, fit
from tests.helpers.pair import run_pair

SMALL = {
    "dataset": "synthetic",
    "dataset.size": 8,
    "dataset.train_images": 90,
    "dataset.test_images": 8,
    "backbone.ratio": 0.125,
    "algorithm.attack.steps": 1,
    "evaluation.steps": 1,
    "evaluation.validation_steps": 1,
    "epochs": 2,
    "batch_size": 20,  # four updates an epoch
    "workers": "1..2",
    "lr": 0.02,
}


@pytest.mark.parametrize("text", ["1..4", "2..2", "3..8"])
def test_range_is_written_as_it_is_read(text: str) -> None:
    workers = read_workers(text)
    assert str(workers) == f"{workers}" == repr(workers) == text
    assert read_workers(workers) == workers
    assert pickle.loads(pickle.dumps(workers)) == workers
    assert ends(workers) == tuple(int(end) for end in text.split(".."))


def test_range_is_not_its_largest_number() -> None:
    assert read_workers("1..4") != 4
    assert Config(workers=Elastic(1, 4)) != Config(workers=4)
    assert max(read_workers("1..4"), 3) == read_workers("1..4")


@pytest.mark.parametrize("text", ["0..2", "4..1", "..", "1..", "a..b", "1...4", "two", "2.5"])
def test_what_is_no_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"workers must be a whole number or a range such as 1\.\.4"
    ):
        override(Config(), {"workers": text})


def test_both_ends_must_split_a_batch_and_what_does_not_between_them_is_passed_over() -> None:
    assert override(Config(), {"workers": "1..4"}).worker_counts == [1, 2, 4]
    assert override(Config(), {"workers": "1..6", "batch_size": 60}).worker_counts == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert Config(workers=2).worker_counts == [2]
    assert counts(read_workers("2..8"), 16) == [2, 4, 8]
    for workers in ("1..3", "3..4"):
        with pytest.raises(ValueError, match=rf"multiple of workers \({workers}\), got 128"):
            override(Config(), {"workers": workers})
    with pytest.raises(ValueError, match="multiple of 8 for cutmix"):
        override(Config(), {"workers": "1..4", "batch_size": 20, "cutmix": 0.5})
    mixed = override(Config(), {"workers": "1..4", "batch_size": 24, "cutmix": 0.5})
    assert mixed.worker_counts == [1, 2, 3, 4]


def test_range_is_kept_by_flatten_and_fingerprints_of_numbers_are_what_they_were() -> None:
    config = override(Config(), {"workers": "1..4"})
    flat = json.loads(json.dumps(flatten(config)))
    assert flat["workers"] == "1..4"
    assert read(flat) == config
    assert config.fingerprint != replace(config, workers=4).fingerprint
    for workers in (1, 2):
        assert override(Config(), {"workers": str(workers)}) == Config(workers=workers)
        given = override(Config(), {"workers": str(workers)})
        assert given.fingerprint == Config(workers=workers).fingerprint
        assert flatten(given)["workers"] == workers


def test_room_is_needed_for_the_fewest() -> None:
    assert shortage(read_workers("2..8"), {"CPU": 2.0}) == ""
    assert "at most the cluster's 1 CPUs, got 2..8" in shortage(read_workers("2..8"), {"CPU": 1.0})


# The same images in every update, however many share it


class Asked:
    """Is asked for a stop after so many updates."""

    def __init__(self, updates: int):
        self.left = updates

    def signal(self) -> Signal:
        self.left -= 1
        return Signal.STOP if self.left <= 0 else Signal.NONE


def logged(folder: Path, name: str) -> None:
    """Write down what every worker of this process is given: update, and sums of its images."""
    batches = Images.batches

    def seen(self: Images, share: Share):  # type: ignore[no-untyped-def]
        for step, (x_BCHW, y_B) in enumerate(batches(self, share), start=share.first):
            with (folder / name).open("a") as file:
                for image, label in zip(x_BCHW, y_B, strict=True):
                    row = [share.epoch, step, int(image.long().sum()), int(label)]
                    file.write(json.dumps(row) + "\n")
            yield x_BCHW, y_B

    Images.batches = seen  # type: ignore[method-assign]
    end_of_run.images_per_second = lambda models, *_: [1.0] * len(models)  # type: ignore[assignment]
    end_of_run.draw = lambda *_: None  # type: ignore[assignment]


def two_of_three_updates(rank: int, folder: str) -> None:
    """Two workers, one of whom is asked to stop, after the third update."""
    torch.set_num_threads(1)
    logged(Path(folder), f"pair{rank}")
    session = Session(rank=rank, world=2, signal=Asked(3 if rank == 0 else 1).signal)
    try:
        fit(override(Config(), SMALL), Path(folder) / "run", session)
    except Stopped as stop:
        Path(folder, f"stop{rank}").write_text(str(stop))


def rows(folder: Path, *names: str) -> set[tuple[int, ...]]:
    found = [
        tuple(json.loads(line))
        for name in names
        for line in (folder / name).read_text().split("\n")[:-1]
    ]
    assert len(found) == len(set(found)), "an image came twice"
    return set(found)


def test_run_that_loses_a_worker_sees_the_images_of_one_that_does_not(tmp_path: Path) -> None:
    run_pair(two_of_three_updates, tmp_path)
    for rank in range(2):
        assert (tmp_path / f"stop{rank}").read_text() == "stopped after epoch 0, update 3"
    before = (Images.batches, end_of_run.images_per_second, end_of_run.draw)
    try:
        logged(tmp_path, "alone")
        fit(override(Config(), SMALL), tmp_path / "run", Session())
        logged_alone = rows(tmp_path, "alone")
        Images.batches = before[0]  # type: ignore[method-assign]
        logged(tmp_path, "straight")
        fit(override(Config(), SMALL), tmp_path / "other", Session())
    finally:
        Images.batches, end_of_run.images_per_second, end_of_run.draw = before  # type: ignore[method-assign,assignment]
    pair = {row for row in rows(tmp_path, "pair0", "pair1") if row[1] < 3}
    assert {row[:2] for row in pair} == {(0, 0), (0, 1), (0, 2)}
    assert len(pair) == 60
    assert pair | logged_alone == rows(tmp_path, "straight")
    assert not pair & logged_alone


def unwritable(rank: int, folder: str) -> None:
    """A file lies where the first worker's checkpoints should."""
    torch.set_num_threads(1)
    (Path(folder) / "run").mkdir(exist_ok=True)
    (Path(folder) / "run" / "checkpoints").touch()
    try:
        loop.fit(override(Config(), SMALL), Path(folder) / "run", Session(rank=rank, world=2))
    except ValueError as error:
        Path(folder, str(rank)).write_text(str(error))


def test_worker_that_cannot_save_ends_the_others_with_its_reason(tmp_path: Path) -> None:
    run_pair(unwritable, tmp_path)
    for rank in range(2):
        assert "best cannot be written: " in (tmp_path / str(rank)).read_text()
