"""Reads finished training runs from MLflow, and counts what it leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import ELSEWHERE
from pipeline.tracking import EVALUATED, open_client, resolve_uri, without_password
from pipeline.tracking.database_file import to_path
from pipeline.tracking.reasons import reason


@dataclass(frozen=True)
class Run:
    """One finished training run, as MLflow has it."""

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    ended: int

    @property
    def settings(self) -> dict[str, str]:
        """What decides its numbers, less the seed."""
        return {k: v for k, v in self.params.items() if k not in (*ELSEWHERE, "seed")}

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.params.get("seed", "0"))


@dataclass
class FoundRuns:
    """Runs to report, and how many others there were, by the reason they are left out."""

    runs: list[Run]
    left_out: Counter[str] = field(default_factory=Counter)


def find(tracking_uri: str, experiment: str, wanted: Mapping[str, str]) -> FoundRuns:
    """Read the finished training runs of an experiment; of equal settings and seed the newest.

    Args:
        wanted: Settings to choose by, each a value or several with commas; ``grid``: the id of a
            parent run.

    Raises:
        ValueError: There is no such database or experiment, or no run has such a setting.
        ConnectionError: The server does not answer.
    """
    found, full = FoundRuns([]), dict[str, Run]()
    for record in fetch(resolve_uri(tracking_uri), experiment):
        run = run_of(record)
        if reason := reason_against(run, record.info.status):
            found.left_out[reason] += 1
            if is_full_evaluation(run, record.info.status):
                full[run.tags[EVALUATED]] = max(
                    run, full.get(run.tags[EVALUATED], run), key=lambda run: run.ended
                )
        else:
            found.runs.append(run)
    known = {key for run in found.runs for key in run.params}
    for key in wanted:
        if found.runs and key != "grid" and key not in known:
            raise ValueError(f"no key {key!r}, only tracking_uri, out, grid, {', '.join(known)}")
    chosen = [run for run in found.runs if all(fits(run, k, v) for k, v in wanted.items())]
    if less := len(found.runs) - len(chosen):
        found.left_out["not asked for"] += less
    found.runs = [with_auto_attack(run, full) for run in newest(chosen)]
    if less := len(chosen) - len(found.runs):
        found.left_out["older runs of the same settings and seed"] += less
    return found


def fetch(uri: str, experiment: str) -> list[Any]:
    """Read every run of an experiment, page by page."""
    shown = without_password(uri)
    if (file := to_path(uri)) is not None and not file.exists():
        raise ValueError(f"no tracking database {shown}")
    try:
        client = open_client(uri)
        if (record := client.get_experiment_by_name(experiment)) is None:
            names = ", ".join(e.name for e in client.search_experiments())
            raise ValueError(f"no experiment {experiment!r} in {shown}, only {names}")
        return every(client, record.experiment_id)
    except ValueError:
        raise
    except Exception as error:
        raise reason(error, uri) from error


def every(client: Any, experiment_id: str, wanted: str = "") -> list[Any]:
    """Read the runs of an experiment that a filter of MLflow's lets through, page by page."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment_id], wanted, max_results=500, page_token=token)
        runs += page
        if not (token := page.token):
            return runs


def run_of(record: Any) -> Run:
    """Take over what MLflow says of a run."""
    return Run(
        record.info.run_id,
        record.info.run_name,
        dict(record.data.params),
        dict(record.data.metrics),
        dict(record.data.tags),
        record.info.end_time or 0,
    )


def reason_against(run: Run, status: str) -> str:
    """Say why a run does not belong in a comparison; empty if it does."""
    if EVALUATED in run.tags:
        return "evaluations of other runs"
    if "trial" in run.tags:  # judged on the test split by another tier, if at all
        return "trials of sweeps"
    if "algorithm" not in run.params or "backbone" not in run.params:
        return "parents of other runs"
    if status != "FINISHED" or run.tags.get("status", "finished") != "finished":
        return "failed or unfinished"
    if "test/sa" not in run.metrics:
        return "without results on the test split"
    return ""


def is_full_evaluation(run: Run, status: str) -> bool:
    """Tell whether a run attacked all test images of another with AutoAttack."""
    whole = run.tags.get("tier") == "full" and status == "FINISHED"
    return EVALUATED in run.tags and whole and "test/ra_aa" in run.metrics


def with_auto_attack(run: Run, full: Mapping[str, Run]) -> Run:
    """Add what a later evaluation under the same threat found by AutoAttack, which takes hours."""
    later = full.get(run.run_id)
    threat = ("evaluation.eps", "evaluation.norm", "dataset.test_images")
    if later is None or any(later.params.get(key) != run.params.get(key) for key in threat):
        return run
    added = {k: v for k, v in later.metrics.items() if k.startswith("test/ra_aa")}
    return replace(run, metrics={**added, **run.metrics})


def fits(run: Run, key: str, values: str) -> bool:
    """Tell whether a run has one of the values, which may be written in other words: 8/255."""
    if key == "grid":
        return run.tags.get("mlflow.parentRunId") in values.split(",")
    own = run.params.get(key)
    return any(own == value or number(own) == number(value) for value in values.split(","))


def number(text: str | None) -> float | str | None:
    """Read a number or a fraction; other words stay as they are."""
    top, slash, bottom = (text or "").partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        return text


def newest(runs: list[Run]) -> list[Run]:
    """Keep the newest run of equal settings, seed and data."""
    best: dict[object, Run] = {}
    for run in sorted(runs, key=lambda run: run.ended):
        data = run.tags.get("dataset_sha256", "")
        best[(tuple(sorted(run.settings.items())), run.seed, data)] = run
    return list(best.values())
