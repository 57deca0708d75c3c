"""The answer of a sweep, from MLflow alone: what is compared, left out and said."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from pipeline.measures.confidence import wilson
from pipeline.sweep import write_answer
from tests.helpers.sweeps import IMAGES, Store, shares


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def test_front_is_written_as_csv_and_markdown(store: Store, tmp_path: Path) -> None:
    parent = store.sweep()
    store.trial(parent, 0, shares(0.50, 0.30), gmac=0.2, settings={"backbone.ratio": 0.5})
    store.trial(parent, 1, shares(0.48, 0.28), gmac=0.1, settings={"backbone.ratio": 0.25})
    store.trial(parent, 2, shares(0.47, 0.27), gmac=0.2, settings={"algorithm.beta": 6})
    store.trial(parent, 3, {"sa": 0.3, "ra": 0.2}, status="stopped")
    store.trial(parent, 4, gmac=0.5, status="infeasible", reason="0.5 GMAC, max_gmac=0.3")
    store.trial(parent, 5, gmac=None, status="failed", reason="NonFiniteError: loss")
    store.trial(parent, 10, gmac=None, status="running")
    files = write_answer(parent, tmp_path / "answer", store.uri)
    assert {file.name for file in files} >= {"front.csv", "answer.md"}
    assert all(file.is_file() for file in files)

    rows = list(csv.DictReader((tmp_path / "answer" / "front.csv").open()))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3", "4", "5", "10"]
    assert [row["on_front"] for row in rows] == ["1", "1", "0", "0", "0", "0", "0"]
    assert float(rows[0]["val/ra_worst"]) == 0.3
    low, high = wilson(120, IMAGES)
    assert float(rows[0]["val/ra_worst_low"]) == pytest.approx(low)
    assert float(rows[0]["val/ra_worst_high"]) == pytest.approx(high)
    assert rows[0]["validation_images"] == "400"
    assert (rows[4]["status"], rows[4]["reason"]) == ("infeasible", "0.5 GMAC, max_gmac=0.3")

    text = (tmp_path / "answer" / "answer.md").read_text()
    assert "# Sweep adv_moe on adv_moe_cifar10_small" in text
    assert "| 0 | 50.0 (45.1 to 54.9) | 30.0 (25.7 to 34.7) | 0.2 | 0.5 | 9 |" in text
    assert "400 images of the validation split" in text
    assert "infeasible: 0.5 GMAC, max_gmac=0.3" in text
    assert "eps 8/255" in text


def test_trial_without_a_finite_number_is_named_and_not_compared(
    store: Store, tmp_path: Path
) -> None:
    parent = store.sweep()
    store.trial(parent, 0, shares(0.5, 0.3))
    store.trial(parent, 1, shares(0.9, 0.9), metrics={"val/ra_worst": math.nan})
    store.trial(parent, 2, shares(0.9, 0.9), metrics={"val/sa": math.inf})
    store.trial(parent, 3, {"sa": 0.9})
    write_answer(parent, tmp_path, store.uri)
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [row["on_front"] for row in rows] == ["1", "0", "0", "0"]
    text = (tmp_path / "answer.md").read_text()
    assert "Trial 1 is not compared: val/ra_worst = nan." in text
    assert "Trial 2 is not compared: val/sa = " in text
    assert "Trial 3 is not compared: val/ra_worst = missing." in text


def test_trial_judged_under_another_threat_is_not_compared(store: Store, tmp_path: Path) -> None:
    parent = store.sweep()
    for number in range(2):
        store.trial(parent, number, shares(0.5 - number / 10, 0.3), gmac=0.2 - number / 10)
    store.trial(parent, 2, shares(0.9, 0.9), settings={"evaluation.eps": "4/255"})
    write_answer(parent, tmp_path, store.uri)
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [row["on_front"] for row in rows] == ["1", "1", "0"]
    assert "Trial 2 is not compared, evaluated under other conditions: evaluation.eps" in (
        (tmp_path / "answer.md").read_text()
    )


def test_of_a_trial_that_ran_twice_the_finished_run_counts(store: Store, tmp_path: Path) -> None:
    parent = store.sweep()
    store.trial(parent, 0, shares(0.5, 0.3))
    store.trial(parent, 0, gmac=None, status="failed")
    write_answer(parent, tmp_path, store.uri)
    (row,) = csv.DictReader((tmp_path / "front.csv").open())
    assert (row["status"], row["on_front"]) == ("finished", "1")
    assert "1 older run(s) of trials that ran again" in (tmp_path / "answer.md").read_text()


def test_sweep_without_a_finished_trial_has_an_answer_that_says_so(
    store: Store, tmp_path: Path
) -> None:
    parent = store.sweep()
    store.trial(parent, 0, gmac=None, status="running")
    assert write_answer(parent, tmp_path, store.uri)
    assert "there is no front" in (tmp_path / "answer.md").read_text()
    empty = store.sweep()
    assert write_answer(empty, tmp_path / "empty", store.uri)


def test_a_run_that_is_no_sweep_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    parent = store.sweep()
    child = store.trial(parent, 0, shares(0.5, 0.3))
    with pytest.raises(ValueError, match=f"run '{child}' must be a sweep"):
        write_answer(child, tmp_path, store.uri)
    with pytest.raises(ValueError, match="no run 'nothing' in sqlite"):
        write_answer("nothing", tmp_path, store.uri)
    with pytest.raises(ValueError, match="no tracking database"):
        write_answer(parent, tmp_path, f"sqlite:///{tmp_path}/none.db")
