"""Ablations: one setting's values beside what they reach, seeds averaged."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from scipy.stats import t as student

from pipeline.measures.confidence import wilson
from pipeline.sweep import write_answer
from pipeline.sweep.ablation import ablation_of, ablation_table
from pipeline.sweep.trials import competing, read_sweep
from tests.helpers.sweeps import IMAGES, Store, shares

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def test_seeds_are_averaged_and_single_trials_keep_the_interval_of_their_images(
    store: Store, tmp_path: Path
) -> None:
    parent = store.sweep("ablation_ratio", keys=("backbone.ratio",))
    for seed, worst in enumerate((0.20, 0.22, 0.24)):
        wide = {"backbone.ratio": 0.5, "seed": seed}
        store.trial(parent, seed, shares(0.5, worst), gmac=0.2, settings=wide)
    store.trial(parent, 3, shares(0.4, 0.18), gmac=0.1, settings={"backbone.ratio": 0.25})
    store.trial(parent, 4, gmac=0.9, status="infeasible", settings={"backbone.ratio": 1.0})
    files = write_answer(parent, tmp_path, store.uri)
    assert {file.name for file in files} >= {"ablation.csv", "ablation.png", "front.html"}
    assert (tmp_path / "ablation.png").read_bytes().startswith(PNG)

    narrow, wide_row = csv.DictReader((tmp_path / "ablation.csv").open())
    assert (narrow["backbone.ratio"], narrow["n"]) == ("0.25", "1")
    assert (wide_row["n"], wide_row["seeds"]) == ("3", "0 1 2")
    assert float(wide_row["val/ra_worst_mean"]) == pytest.approx(0.22)
    half = student.ppf(0.975, 2) * 0.02 / 3**0.5
    assert float(wide_row["val/ra_worst_high"]) == pytest.approx(0.22 + half)
    low, high = wilson(72, IMAGES)
    assert float(narrow["val/ra_worst_low"]) == pytest.approx(low)
    assert float(narrow["val/ra_worst_high"]) == pytest.approx(high)
    assert float(wide_row["cost/gmac"]) == pytest.approx(0.2)

    text = (tmp_path / "answer.md").read_text()
    assert "## Ablation of ratio" in text
    assert "| 0.5 | 3 | 50.0 (50.0 to 50.0) |" in text
    assert "+4.0 (" in text
    assert "What goes with better numbers" not in text


def test_grid_of_two_settings_is_a_row_for_each_pair_in_order(store: Store) -> None:
    keys = ("algorithm.attack.eps", "algorithm.attack.steps")
    parent = store.sweep("ablation_attack", keys=keys)
    grid = [(eps, steps) for eps in ("12/255", "4/255") for steps in (4, 1)]
    for number, pair in enumerate(grid):
        store.trial(parent, number, shares(0.5, 0.3), settings=dict(zip(keys, pair, strict=True)))
    sweep = read_sweep(store.uri, parent)
    found = ablation_of(sweep, competing(sweep)[0])
    assert found is not None
    assert found.values == ("4/255 / 1", "4/255 / 4", "12/255 / 1", "12/255 / 4")
    assert ablation_table(found).header[0] == "eps, steps"


def test_what_differs_besides_is_said(store: Store) -> None:
    parent = store.sweep("ablation_beta", keys=("algorithm.beta",))
    for number, beta in enumerate((1, 3)):
        settings = {"algorithm.beta": beta, "lr": 0.1 * beta}
        store.trial(parent, number, shares(0.5, 0.3), settings=settings)
    sweep = read_sweep(store.uri, parent)
    found = ablation_of(sweep, competing(sweep)[0])
    assert found is not None
    assert found.notes == ("The trials differ in lr as well.",)


def test_search_of_several_settings_is_no_ablation(store: Store) -> None:
    parent = store.sweep("adv_moe", keys=("algorithm.beta", "lr"))
    for number, (beta, lr) in enumerate(((1, 0.1), (1, 0.2), (3, 0.1))):
        settings = {"algorithm.beta": beta, "lr": lr}
        store.trial(parent, number, shares(0.5, 0.3), settings=settings)
    sweep = read_sweep(store.uri, parent)
    assert ablation_of(sweep, competing(sweep)[0]) is None
