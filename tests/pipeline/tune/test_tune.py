"""Sweeps as a user runs them, on one Ray: early stopping, a killed driver, no room, a script."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.presets import PRESETS
from pipeline.presets.paper_grid import costs
from pipeline.tracking import resolve_run
from pipeline.tune.__main__ import run as sweep
from pipeline.tune.asha import Halving
from pipeline.tune.finalists import front
from pipeline.tune.search import next_point
from pipeline.tune.sweep_request import SweepRequest, prospect, read_request
from pipeline.tune.trial_log import TrialLog, TrialRecord
from tests.fault.faults import WORDS, Command
from tune_spaces import SPACES

NAMES = ("adv_moe", "quickstart")


def request(*words: str, names: tuple[str, ...] = NAMES) -> SweepRequest:
    return read_request(names, dict(word.split("=", 1) for word in words))


# The request


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "which space"),
        ("adv", "no space 'adv'; nearest: adv_moe"),
        ("adv_moe quick", "no preset 'quick'; nearest: quickstart"),
        ("adv_moe quickstart num_samples=0", "num_samples must be at least 1, got 0"),
        ("adv_moe quickstart concurrent=0", "concurrent must be at least 1, got 0"),
        ("adv_moe quickstart finalists=-1", "finalists must be at least 0, got -1"),
        ("adv_moe quickstart max_gmac=0", "max_gmac must be above 0"),
        ("adv_moe quickstart search=pbt", "population based training does nothing under Ray Train"),
        ("adv_moe quickstart search=grid", "search must be random or optuna, got 'grid'"),
        ("adv_moe quickstart scheduler=pbt", "scheduler must be asha or none, got 'pbt'"),
        ("adv_moe quickstart workers=1..2", r"workers must be a whole number for a sweep"),
        ("adv_moe quickstart storage=s3://a/b", "storage must be a folder that all nodes share"),
        ("adv_moe quickstart epochz=1", "no key 'epochz'"),
        ("adv_moe quickstart algorithm=trades", r"no key 'algorithm\.router_loss' in quickstart"),
        ("ablation_beta quickstart algorithm.beta=6", "nothing to search"),
        ("ablation_beta quickstart num_samples=9", "at most the grid's 4 points, got 9"),
        ("ablation_beta quickstart search=optuna", "search must be left out for a grid"),
        ("adv_moe quickstart --pbt", "no option '--pbt'"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(words.split())


def test_a_sweep_is_found_again_by_what_it_searches_not_by_how_much_of_it() -> None:
    folder = request().folder
    for same in ("num_samples=50", "concurrent=1", "finalists=0"):
        assert request(same).folder == folder
    for other in ("epochs=3", "max_gmac=1", "search=optuna", "scheduler=none", "lr=0.1"):
        assert request(other).folder != folder


def test_a_key_that_is_given_is_not_searched() -> None:
    given = request("algorithm.beta=3", "backbone.ratio=0.5")
    assert set(SPACES["adv_moe"].keys) - set(given.keys) == {"algorithm.beta", "backbone.ratio"}
    config = given.config("000", next_point(given, 0, []))
    assert (config.algorithm.beta, config.backbone.ratio) == (3.0, 0.5)  # type: ignore[attr-defined]


def test_points_that_cannot_be_run_say_why() -> None:
    dear = request("max_gmac=0.001")
    found = prospect(dear, "000", {"backbone.ratio": 0.5})
    own, _ = costs(dear.config("000", {"backbone.ratio": 0.5}))
    assert found.costs["cost/gmac"] == own.gmac
    assert found.reason == f"cost/gmac must be at most max_gmac=0.001, got {own.gmac:.4g}"
    assert "leaves no channel of 96" in prospect(request(), "0", {"backbone.ratio": 0.01}).reason
    assert "num_experts must be" in prospect(request(), "0", {"backbone.num_experts": 1}).reason
    assert prospect(request(), "0", {"backbone.ratio": 0.5}).reason == ""


# The search


def test_random_points_follow_from_the_seed_and_the_number_alone() -> None:
    one, other = request(), request("seed=1")
    assert next_point(one, 3, []) == next_point(one, 3, [({}, None)])
    assert next_point(one, 3, []) != next_point(one, 4, [])
    assert next_point(one, 3, []) != next_point(other, 3, [])
    json.dumps(next_point(one, 3, []))  # plain numbers: they are kept in the log


def test_a_grid_is_walked_through_once() -> None:
    grid = request(names=("ablation_attack", "quickstart"))
    points = [next_point(grid, index, []) for index in range(grid.samples)]
    pairs = {(p["algorithm.attack.eps"], p["algorithm.attack.steps"]) for p in points}
    assert pairs == {(eps / 255, steps) for eps in (4, 8, 12) for steps in (1, 2, 4)}
    fixed = request("algorithm.attack.steps=2", names=("ablation_attack", "quickstart"))
    assert (fixed.samples, len(next_point(fixed, 2, []))) == (3, 1)


def test_optuna_goes_where_trials_were_good_and_is_a_function_of_what_it_is_told() -> None:
    """Twenty trials say that all that matters is a low learning rate."""
    pytest.importorskip("optuna")
    asked = request("search=optuna")
    known = []
    for index in range(20):
        point = next_point(request(), index, [])
        gain = 1 - np.log(point["lr"] / 0.03) / np.log(10)  # 1 at the lower end, 0 at the upper
        metrics = {"val/sa": gain, "val/ra_worst": gain, "cost/gmac": 1.0}
        known.append((point, metrics))
    rates = [next_point(asked, index, known)["lr"] for index in range(20, 36)]
    drawn = [next_point(request(), index, [])["lr"] for index in range(20, 36)]
    assert np.mean(np.log(rates)) < np.mean(np.log(drawn)) - 0.2
    assert next_point(asked, 20, known) == next_point(asked, 20, known)
    running = [*known, (next_point(asked, 20, known), None)]
    assert next_point(asked, 21, running) != running[-1][0]


# Early stopping


def stops(
    reports: list[tuple[str, int, float]], epochs: int, grace: int, reduction: int
) -> dict[str, int]:
    """ASHA written out: at each rung, stop whoever is below the percentile of those before it."""
    rungs = [grace * reduction**k for k in range(10) if grace * reduction**k < epochs]
    seen: dict[int, dict[str, float]] = {rung: {} for rung in rungs}
    stopped: dict[str, int] = {}
    for name, epoch, value in reports:
        passed = [rung for rung in rungs if rung <= epoch]
        if not passed or epoch >= epochs or name in seen[passed[-1]]:
            continue
        before = list(seen[passed[-1]].values())
        if before and value < np.percentile(before, 100 * (1 - 1 / reduction)):
            stopped[name] = epoch
        seen[passed[-1]][name] = value
    return stopped


def reported(count: int, epochs: int) -> list[tuple[str, int, float]]:
    """Reports of trials in turn, at random."""
    draws = np.random.default_rng(0)
    rows = [(f"{t:03d}", e) for e in range(1, epochs + 1) for t in range(count)]
    return [(name, epoch, float(draws.random())) for name, epoch in rows]


class Told:
    """A trial as Tune hands it to a scheduler, and what the scheduler then says."""

    def __init__(self, name: str):
        self.config, self.trial_id = {"trial": name}, f"tune-{name}-{time.time_ns()}"


@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_a_scheduler_that_is_told_again_decides_as_if_it_had_not_been_away(cut: int) -> None:
    asked, reports = request("epochs=6"), reported(8, 6)
    noted: list[Any] = []
    halted: dict[str, int] = {}

    def drive(some: list[tuple[str, int, float]]) -> None:
        scheduler = Halving(asked, list(noted), noted.append, halted.__setitem__)
        for name, epoch, value in some:
            if name not in halted:
                scheduler.on_trial_result(None, Told(name), {"epoch": epoch, "val/ra": value})

    drive(reports[:cut])
    drive(reports[cut:])
    assert halted == stops(noted, 6, grace=1, reduction=2)
    assert 0 < len(halted) < 8
    assert max(halted.values()) < 6  # after the last epoch there is nothing to save


# The front


def test_finalists_are_the_front_the_most_robust_first(tmp_path: Path) -> None:
    log = TrialLog(request(f"storage={tmp_path}"))
    rows = [(0.9, 0.1, 1.0), (0.5, 0.5, 1.0), (0.4, 0.4, 1.0), (0.4, 0.4, 0.5), (0.9, 0.9, 0.1)]
    for place, (sa, worst, gmac) in enumerate(rows):
        metrics = {"val/sa": sa, "val/ra_worst": worst, "cost/gmac": gmac}
        status = "finished" if place < 4 else "stopped"
        log.entries.append(
            TrialRecord(trial=f"{place:03d}", point={}, status=status, metrics=metrics)
        )
    assert [entry.trial for entry in front(log)] == ["001", "003", "000"]


def test_lists_and_dry_runs_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep(["--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(SPACES)
    assert sweep(["adv_moe", "--list"]) == 0
    assert "algorithm.router_loss  ['pseudo_label', 'trades']" in capsys.readouterr().out
    assert sweep(["ablation_ratio", "quickstart", "max_gmac=0.01", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    own, _ = costs(PRESETS["quickstart"]())
    assert f"backbone.ratio=0.5  {own.gmac:.4g} GMAC" in lines[1]
    assert "infeasible: cost/gmac must be at most max_gmac=0.01" in lines[3]
    assert not list(tmp_path.iterdir())


# Sweeps on Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One Ray of two CPUs for all sweeps, as a cluster that outlives them; yields its address."""
    import ray

    environment = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def command(tmp_path: Path, cluster: str) -> Iterator[Command]:
    made = Command(tmp_path, RAY_ADDRESS=cluster)
    yield made
    made.close()


def all_is_free() -> bool:
    import ray

    return ray.available_resources().get("CPU", 0.0) == 2.0


def wait_until(condition: Any, process: subprocess.Popen[bytes] | None, log: Path) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def book_of(home: Path) -> dict[str, Any]:
    (path,) = (home / "runs" / "robust-moe").glob("tune-*/trials.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def runs_of(home: Path) -> tuple[Any, dict[str, Any], Any]:
    """The parent run, its children by trial, and the client."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("robust-moe")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags.get("robust_moe.kind") == "sweep")
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 1 + len(children), "a trial has two runs, or one is nobody's child"
    named = {run.data.tags["trial"]: run for run in children}
    assert len(named) == len(children)
    return parent, named, client


SWEEP = (
    *("adv_moe", "quickstart", *WORDS, "epochs=2", "num_samples=6", "concurrent=1"),
    *("max_gmac=0.012", "finalists=0"),
)


def test_killed_driver_and_the_same_command_finish_the_sweep(command: Command) -> None:
    """What was done is kept, early stopping goes on as if nothing had been, nothing stays open."""
    driver = command.start("pipeline.tune", *SWEEP)

    def one_is_done_and_another_runs() -> bool:
        try:
            trials = book_of(command.home)["trials"]
        except ValueError:  # no log yet
            return False
        statuses = [trial["status"] for trial in trials]
        return "running" in statuses and bool({"finished", "stopped"} & set(statuses))

    wait_until(one_is_done_and_another_runs, driver, command.log)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {t["trial"]: t for t in book_of(command.home)["trials"]}
    wait_until(all_is_free, None, command.log)  # though nobody was left to free it
    _, early, _ = runs_of(command.home)

    code, out = command.run("pipeline.tune", *SWEEP)
    assert code == 0, out
    log = book_of(command.home)
    after = {trial["trial"]: trial for trial in log["trials"]}
    assert list(after) == [f"{number:03d}" for number in range(6)]
    for name, trial in before.items():
        assert after[name]["point"] == trial["point"]
        if trial["status"] != "running":
            assert after[name] == trial, "done again"
            assert f"[{name}] " not in out

    parent, children, client = runs_of(command.home)
    assert {name: run.info.run_id for name, run in early.items()}.items() <= {
        name: run.info.run_id for name, run in children.items()
    }.items()
    assert (parent.info.status, parent.data.tags["space"]) == ("FINISHED", "adv_moe")
    statuses = {name: trial["status"] for name, trial in after.items()}
    assert {name: run.data.tags["status"] for name, run in children.items()} == statuses
    check_feasible(children, statuses)
    watched = {
        name: [p.value for p in client.get_metric_history(run.info.run_id, "val/ra")]
        for name, run in children.items()
    }
    reports = [(str(n), int(e), float(v)) for n, e, v in log["reports"]]
    assert all(watched[name][epoch - 1] == value for name, epoch, value in reports)
    expected = stops(reports, 2, grace=1, reduction=2)
    assert {n for n, status in statuses.items() if status == "stopped"} == set(expected)
    found = set(statuses.values())  # whether one is stopped early is up to a CPU's last digits
    assert {"finished", "infeasible"} <= found <= {"finished", "stopped", "infeasible"}

    latest = resolve_run(f"sqlite:///{command.home}/mlflow.db", "latest", "robust-moe")
    assert latest in {run.info.run_id for run in children.values()}  # the parent has no model

    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.json", "answer"} <= files
    told = json.loads(Path(client.download_artifacts(parent.info.run_id, "sweep.json")).read_text())
    assert (told["space"], told["split"]) == ("adv_moe", "validation")
    assert ["val/ra_worst", "max"] in told["objectives"]

    code, out = command.run("pipeline.tune", *SWEEP)
    assert code == 0, out
    assert "6 done before" in out
    wait_until(all_is_free, None, command.log)


def check_feasible(children: dict[str, Any], statuses: dict[str, str]) -> None:
    """Each trial has its costs, finished ones the worst case of attacks with a forced route."""
    for name, run in children.items():
        metrics, params = run.data.metrics, run.data.params
        assert (metrics["cost/gmac"] > 0.012) == (statuses[name] == "infeasible")
        assert not [key for key in metrics if key.startswith("test/")]
        assert params["algorithm.beta"] != str(PRESETS["quickstart"]().algorithm.beta)  # type: ignore[attr-defined]
        if statuses[name] == "infeasible":
            assert "max_gmac" in run.data.tags["reason"]
        elif statuses[name] == "stopped":
            assert run.data.tags["reason"] == "by ASHA after epoch 1"
            assert "val/ra_worst" not in metrics
        else:
            least = min(metrics["val/ra"], metrics["val/ra_forced"])
            assert metrics["val/ra_worst"] <= least <= metrics["val/sa"]


def test_two_trials_at_a_time_share_two_cpus_and_a_finalist_meets_the_test_split(
    command: Command,
) -> None:
    words = ("ablation_ratio", "quickstart", *WORDS, "epochs=1", "num_samples=2")
    code, out = command.run("pipeline.tune", *words)
    assert code == 0, out
    assert "2 to run, 2 at a time on 2 CPU(s)" in out
    starts = [out.index(f"[00{trial}] backbone.ratio") for trial in (0, 1)]
    assert max(starts) < min(out.index(f"[00{trial}] finished") for trial in (0, 1))
    _, children, client = runs_of(command.home)
    judged = [run for run in children.values() if "test/ra_worst" in run.data.metrics]
    best = max(run.data.metrics["val/ra_worst"] for run in children.values())
    assert [run.data.metrics["val/ra_worst"] for run in judged] == [best]  # the first of a tie
    assert judged[0].info.status == "FINISHED"
    assert "card.md" in {file.path for file in client.list_artifacts(judged[0].info.run_id)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("workers=64", "batch_size=256"), "workers must be at most the cluster's 2 CPUs, got 64"),
        (("concurrent=3",), "concurrent must be at most 2: trials of 1 worker(s) on the cluster's"),
    ],
)
def test_more_than_the_cluster_has_is_one_clear_line(
    command: Command, words: tuple[str, ...], message: str
) -> None:
    code, out = command.run("pipeline.tune", "adv_moe", "quickstart", *WORDS[:-3], *words)
    assert code == 2, out
    assert message in out.splitlines()[-1]
    assert "Traceback" not in out


SCRIPT = """
from ray import tune

from pipeline.config import override
from pipeline.loop import fit
from pipeline.presets import PRESETS
from pipeline.end_of_run import tryout
from tune_spaces import SPACES
from pathlib import Path
import sys

space = SPACES["adv_moe"]
fixed = dict(word.split("=", 1) for word in sys.argv[2:])


def trial(point):
    config = override(PRESETS["quickstart"](), {**point, **fixed, "workers": 1})
    return fit(config, Path(sys.argv[1]) / tune.get_context().get_trial_id(), ending=tryout)


found = tune.Tuner(
    trial,
    param_space=dict(space.keys),
    tune_config=tune.TuneConfig(num_samples=2, metric="val/ra_worst", mode="max"),
).fit()
print("best", found.get_best_result().metrics["val/ra_worst"], len(found))
"""


def test_a_space_serves_a_script_of_the_users_own(command: Command) -> None:
    script = command.home / "search.py"
    script.write_text(SCRIPT)
    home = str(command.home / "trials")
    done = subprocess.run(
        [sys.executable, str(script), home, *WORDS, "epochs=1", "backbone.ratio=0.25"],
        cwd=command.home,
        env=command.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, value, count = done.stdout.splitlines()[-1].split()
    assert 0 <= float(value) <= 1
    assert count == "2"
