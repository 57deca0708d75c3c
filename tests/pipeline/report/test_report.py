"""The report reads MLflow alone: what it averages, compares, sets apart and leaves out."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from pipeline.config.overrides import flatten, override
from pipeline.measures.confidence import wilson
from pipeline.presets.paper_grid import ROWS, Row, cell
from pipeline.report.__main__ import run
from pipeline.report.grouping import blocks_of
from pipeline.report.runs import find
from pipeline.report.statistics import difference, estimate
from pipeline.report.tables import points
from pipeline.tracking import EVALUATED

IMAGES = 1000
EPOCHS = cell("small", "cifar10", "dense").epochs
PNG = b"\x89PNG\r\n\x1a\n"


class Server:
    """An MLflow database that the test fills."""

    def __init__(self, folder: Path):
        from mlflow import MlflowClient

        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)

    def experiment(self, name: str) -> str:
        return str(self.client.create_experiment(name))

    def add(
        self,
        experiment: str,
        algorithm: str = "dense",
        hits: Mapping[str, int] | None = None,
        *,
        status: str = "FINISHED",
        tags: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> str:
        """Log a run of which so many of 1,000 test images stand, as the pipeline logs it."""
        from mlflow.entities import Metric, Param

        changes = {key.replace("__", "."): value for key, value in settings.items()}
        config = override(cell("small", "cifar10", algorithm), changes)
        run_id = self.client.create_run(
            experiment, run_name=config.name, tags={"dataset_sha256": "abc", **(tags or {})}
        ).info.run_id
        values = {"cost/gmac": 0.1, "cost/params": 2e6, "cost/images_per_second": 100.0}
        for name, count in (hits or {}).items():
            low, high = wilson(count, IMAGES)
            values |= {f"test/{name}": count / IMAGES}
            values |= {f"test/{name}_low": low, f"test/{name}_high": high}
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, 0, 0) for key, value in values.items()],
            params=[Param(key, str(value)) for key, value in flatten(config).items()],
        )
        self.client.set_terminated(run_id, status)
        return str(run_id)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("server"))


def hits(sa: int, ra: int, worst: int) -> dict[str, int]:
    return {"sa": sa, "ra_pgd50": ra, "ra_worst": worst}


# Intervals


def test_interval_over_seeds_equals_the_formula_by_hand() -> None:
    """0.50, 0.52, 0.54: mean 0.52, std 0.02, half 4.303 * 0.02 / sqrt(3) = 0.04968."""
    found = estimate([0.50, 0.52, 0.54])
    assert (found.mean, found.std, found.n) == (pytest.approx(0.52), pytest.approx(0.02), 3)
    assert found.high - found.mean == pytest.approx(0.04968, abs=1e-5)
    assert found.mean - found.low == pytest.approx(0.04968, abs=1e-5)


def test_difference_of_single_runs_equals_newcombe_s_published_example() -> None:
    """56/70 against 48/80 (Newcombe 1998, table II, row a, method 10): 0.0524 to 0.3339."""
    first, second = (estimate([k / n], *wilson(k, n)) for k, n in ((56, 70), (48, 80)))
    found = difference(first, second)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (
        pytest.approx(0.0524, abs=5e-5),
        pytest.approx(0.3339, abs=5e-5),
    )
    assert found.over == "images"


def test_difference_over_seeds_equals_welch_by_hand() -> None:
    """Variances 4e-4/3 and 1e-4/3: df = 25/(16/2 + 1/2) = 2.941, se = sqrt(5e-4/3) = 0.012910."""
    found = difference(estimate([0.50, 0.52, 0.54]), estimate([0.39, 0.40, 0.41]))
    assert found.value == pytest.approx(0.12)
    assert found.high - found.value == pytest.approx(
        student.ppf(0.975, 25 / 8.5) * 0.0129099, abs=1e-6
    )
    assert found.over == "seeds"


def test_difference_of_seeds_and_a_single_run_takes_each_side_s_own_interval() -> None:
    several, one = estimate([0.50, 0.52, 0.54]), estimate([0.4], *wilson(400, 1000))
    found = difference(several, one)
    assert found.low == pytest.approx(
        0.12 - math.hypot(0.04968, wilson(400, 1000)[1] - 0.4), abs=1e-4
    )
    assert found.over == "seeds and images"
    back = difference(one, several)
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_seeds_without_spread_are_refused_an_interval() -> None:
    found = difference(estimate([0.5, 0.5]), estimate([0.4, 0.4]))
    assert found.value == pytest.approx(0.1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert points(found) == "+10.0 (no interval)e"
    one_sided = difference(estimate([0.5, 0.5]), estimate([0.4, 0.42]))
    assert one_sided.low < one_sided.value < one_sided.high


# What is read


def test_grid_is_laid_out_and_written(server: Server, tmp_path: Path, capsys: Any) -> None:
    name = "whole"
    where = server.experiment(name)
    for seed, shift in enumerate((0, 20, 40)):
        server.add(where, "adv_moe", hits(600, 320 + shift, 300), seed=seed)
    server.add(where, "dense", hits(580, 300, 290))
    server.add(where, "s_dense", hits(500, 250, 240) | {"ra_aa": 255})
    server.add(where, "moe_at", hits(1, 1, 1), status="FAILED")
    server.add(where, "moe_at", hits(1, 1, 1), status="RUNNING")
    server.add(where, "dense", hits(1, 1, 1), tags={EVALUATED: "another"})
    assert run([name, f"tracking_uri={server.uri}", f"out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    order = [line[:2] for line in lines if line[:1] in (["AT"], ["AdvMoE"])]
    assert order == [["AT", "(Dense)"], ["AT", "(S-Dense)"], ["AdvMoE", "3"]]
    assert "Left out: 1 evaluations of other runs; 2 failed or unfinished." in out

    dense, narrow, ours = csv.DictReader((tmp_path / "out" / "report.csv").open())
    assert float(ours["ra_mean"]) == pytest.approx(0.34)
    assert float(ours["ra_std"]) == pytest.approx(0.02)
    assert (ours["n"], ours["seeds"]) == ("3", "0 1 2")
    assert float(ours["ra_minus_dense"]) == pytest.approx(0.04)
    low = math.hypot(4.3027 * 0.02 / math.sqrt(3), wilson(300, IMAGES)[1] - 0.3)
    assert float(ours["ra_minus_dense_low"]) == pytest.approx(0.04 - low, abs=1e-5)
    assert ours["ra_minus_dense_over"] == "seeds and images"
    assert narrow["ra_minus_dense_over"] == "images"
    assert float(narrow["ra_aa_mean"]) == pytest.approx(0.255)
    assert dense["ra_minus_dense"] == dense["ra_aa_mean"] == ""
    assert float(dense["gmac"]) == pytest.approx(0.1)

    text = (tmp_path / "out" / "report.md").read_text()
    assert "## small on CIFAR-10" in text
    assert "linf, eps 8/255, 50 steps of 2/255" in text
    assert "| AdvMoE | 3 | 60.0 ± 0.0 | 34.0 ± 2.0 | 30.0 ± 0.0 | - | - |" in text
    assert (
        "| AT (S-Dense) | 1 | 50.0 | 25.0 | 24.0 | 25.5 | -1.5 | 0.1000 | 2.00 M | 100 | -5.0 ("
        in text
    )
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(PNG)


def test_differences_can_be_to_another_row(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = server.experiment("over")
    server.add(where, "dense", hits(580, 300, 290))
    server.add(where, "s_dense", hits(500, 260, 240), epochs=20)
    server.add(where, "adv_moe", hits(500, 250, 250))
    given = ["over", f"tracking_uri={server.uri}", f"out={tmp_path}"]
    assert run([*given, "over=s_dense"]) == 0
    out = capsys.readouterr().out
    assert "RA worst - S-Dense" in out
    assert f"AdvMoE: compared with AT (S-Dense) with epochs 20 there, {EPOCHS} here." in out
    dense, narrow, ours = csv.DictReader((tmp_path / "report.csv").open())
    assert float(dense["ra_worst_minus_s_dense"]) == pytest.approx(0.05)
    assert narrow["ra_worst_minus_s_dense"] == ""
    assert float(ours["ra_minus_s_dense"]) == pytest.approx(-0.01)
    with pytest.raises(ValueError, match=r"over must be a row such as .*, got 'none'"):
        run([*given, "over=none"])


def test_row_of_one_line_is_reported_and_plotted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    row = Row("Plain PGD", "pgd_training", False, False, "cross-entropy", "arXiv:1706.06083")
    monkeypatch.setitem(ROWS, "plain", row)
    where = server.experiment("row")
    server.add(where, "dense", hits(580, 300, 290))
    server.add(where, "plain", hits(600, 280, 270))
    assert run(["row", f"tracking_uri={server.uri}", f"out={tmp_path}"]) == 0
    assert "\nPlain PGD " in capsys.readouterr().out
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)


def test_different_threats_and_data_are_never_averaged(
    server: Server, capsys: Any, tmp_path: Path
) -> None:
    where = server.experiment("apart")
    server.add(where, "adv_moe", hits(500, 300, 290))
    server.add(where, "adv_moe", hits(500, 400, 390), seed=1, evaluation__eps=4 / 255)
    server.add(where, "adv_moe", hits(500, 200, 190), seed=2, dataset__train_images=100)
    server.add(where, "adv_moe", hits(500, 100, 90), seed=3, tags={"dataset_sha256": "other"})
    blocks = blocks_of(find(server.uri, "apart", {}).runs)
    assert [len(row.runs) for block in blocks for row in block.rows] == [1, 1, 1, 1]
    run(["apart", f"tracking_uri={server.uri}", f"out={tmp_path}"])
    out = capsys.readouterr().out
    assert "small on CIFAR-10 has 4 blocks, not averaged:" in out
    assert "dataset.train_images=None, evaluation.eps=0.0156863, data=abc" in out


def test_rows_of_other_settings_say_in_what_they_differ(server: Server) -> None:
    where = server.experiment("rows")
    server.add(where, "dense", hits(500, 300, 290), epochs=20)
    server.add(where, "adv_moe", hits(500, 300, 290), algorithm__router_loss="trades")
    server.add(where, "adv_moe", hits(500, 310, 290))
    (block,) = blocks_of(find(server.uri, "rows", {}).runs)
    assert [row.title for row in block.rows] == [
        "AT (Dense)",
        "AdvMoE [algorithm.router_loss=pseudo_label]",
        "AdvMoE [algorithm.router_loss=trades]",
    ]
    assert {row.note for row in block.rows[1:]} == {f"epochs 20 there, {EPOCHS} here"}


def test_later_full_evaluation_gives_the_accuracy_under_autoattack(server: Server) -> None:
    where = server.experiment("later")
    run_id = server.add(where, "dense", hits(500, 300, 290))
    child = {EVALUATED: run_id, "tier": "full"}
    server.add(where, "dense", hits(1, 2, 3) | {"ra_aa": 270}, tags=child)
    server.add(where, "dense", {"ra_aa": 1}, tags=child | {"tier": "standard"})
    (found,) = find(server.uri, "later", {}).runs
    assert found.metrics["test/ra_aa"] == 0.27
    assert found.metrics["test/ra_worst"] == 0.29


def test_evaluation_at_another_radius_gives_nothing(server: Server) -> None:
    where = server.experiment("radius")
    run_id = server.add(where, "dense", hits(500, 300, 290))
    child = {EVALUATED: run_id, "tier": "full"}
    server.add(where, "dense", {"ra_aa": 270}, tags=child, evaluation__eps=4 / 255)
    (found,) = find(server.uri, "radius", {}).runs
    assert "test/ra_aa" not in found.metrics


def test_numbers_that_the_checks_do_not_stand_behind_are_marked(
    server: Server, tmp_path: Path, capsys: Any
) -> None:
    where = server.experiment("doubts")
    doubt = {"verdict": "unreliable", "verdict_why": "Square wins"}
    server.add(where, "dense", hits(500, 300, 290), tags={"verdict": "reliable"})
    server.add(where, "adv_moe", hits(500, 300, 290), tags=doubt)
    run(["doubts", f"tracking_uri={server.uri}", f"out={tmp_path}"])
    out = capsys.readouterr().out
    assert "AdvMoE†" in out
    assert "AT (Dense)†" not in out
    assert "AdvMoE: 1 of 1 run(s) judged unreliable (Square wins)." in out
    for seed, words in enumerate(("gap: of 4.1", "gap: of 3.2; noise: stronger", "gap: of 4.1")):
        tags = {"verdict": "unreliable", "verdict_why": words}
        server.add(where, "moe_at", hits(500, 300, 290), tags=tags, seed=seed)
    run(["doubts", f"tracking_uri={server.uri}", f"out={tmp_path}"])
    told = "3 of 3 run(s) judged unreliable (gap: of 3.2; noise: stronger; gap: of 4.1)."
    assert told in capsys.readouterr().out


def test_of_equal_settings_and_seed_the_newest_run_counts(server: Server) -> None:
    where = server.experiment("again")
    server.add(where, "dense", hits(500, 300, 290))
    newest = server.add(where, "dense", hits(500, 310, 290))
    found = find(server.uri, "again", {})
    assert [run.run_id for run in found.runs] == [newest]
    assert found.left_out == {"older runs of the same settings and seed": 1}


def test_runs_are_chosen_by_their_settings_and_their_parent(server: Server) -> None:
    where = server.experiment("chosen")
    server.add(where, "dense", hits(500, 300, 290), epochs=20)
    child = server.add(where, "adv_moe", hits(500, 300, 290), tags={"mlflow.parentRunId": "p"})

    def chosen(**wanted: str) -> list[str]:
        return [run.run_id for run in find(server.uri, "chosen", wanted).runs]

    assert (
        chosen(grid="p")
        == chosen(epochs=str(EPOCHS))
        == chosen(algorithm="adv_moe,standard")
        == [child]
    )
    assert len(chosen(**{"algorithm.attack.eps": "8/255"})) == 2
    with pytest.raises(ValueError, match="no key 'epoch'; nearest: epochs, "):
        chosen(epoch="1")


def test_an_experiment_that_is_not_there_is_an_error_of_one_line(server: Server) -> None:
    server.experiment("there")
    with pytest.raises(ValueError, match=r"no experiment 'ther' in sqlite:.*; nearest: there, "):
        run(["ther", f"tracking_uri={server.uri}"])


def test_nothing_finished_is_a_failure_that_says_what_there_is(server: Server, capsys: Any) -> None:
    server.add(server.experiment("unfinished"), "dense", status="KILLED")
    assert run(["unfinished", f"tracking_uri={server.uri}"]) == 1
    assert (
        "no finished training run in experiment 'unfinished': 1 failed" in capsys.readouterr().err
    )
