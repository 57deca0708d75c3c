"""Selection of the finished training runs that may be compared, and a count of those left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.nearest_names import unknown
from pipeline.tracking import EVALUATED
from pipeline.tracking.queries import PARENT, Run, experiment_of, reading, search


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
    with reading(tracking_uri) as client:
        every = search(client, experiment_of(client, experiment, tracking_uri))
    reasons = [reason_against(run) for run in every]
    found = FoundRuns([], Counter(filter(None, reasons)))
    able = [run for run, reason in zip(every, reasons, strict=True) if not reason]
    known = ("tracking_uri", "out", "over", "grid", *{key for run in able for key in run.params})
    for key in wanted:
        if able and key not in known:
            raise unknown("key", key, known)
    chosen = [run for run in able if all(fits(run, k, v) for k, v in wanted.items())]
    later = {
        run.tags[EVALUATED]: run
        for run in sorted(every, key=lambda run: run.ended)
        if is_full_evaluation(run)
    }
    found.runs = [with_auto_attack(run, later.get(run.run_id)) for run in newest_of_each(chosen)]
    left = {"not asked for": (able, chosen)}
    left["older runs of the same settings and seed"] = (chosen, found.runs)
    found.left_out += Counter({why: len(a) - len(b) for why, (a, b) in left.items()})
    return found


def reason_against(run: Run) -> str:
    """Say why a run does not belong in a comparison; empty if it does."""
    if EVALUATED in run.tags:
        return "evaluations of other runs"
    if "trial" in run.tags:  # judged on the test split by another tier, if at all
        return "trials of sweeps"
    if "algorithm" not in run.params or "backbone" not in run.params:
        return "parents of other runs"
    if run.status != "FINISHED" or run.tags.get("status", "finished") != "finished":
        return "failed or unfinished"
    if "test/sa" not in run.metrics:
        return "without results on the test split"
    return ""


def is_full_evaluation(run: Run) -> bool:
    """Tell whether a run attacked all test images of another with AutoAttack."""
    whole = run.tags.get("tier") == "full" and run.status == "FINISHED"
    return EVALUATED in run.tags and whole and "test/ra_aa" in run.metrics


def with_auto_attack(run: Run, later: Run | None) -> Run:
    """Add what a later evaluation under the same threat found by AutoAttack, which takes hours."""
    threat = ("evaluation.eps", "evaluation.norm", "dataset.test_images")
    if later is None or any(later.params.get(key) != run.params.get(key) for key in threat):
        return run
    added = {k: v for k, v in later.metrics.items() if k.startswith("test/ra_aa")}
    return replace(run, metrics={**added, **run.metrics})


def fits(run: Run, key: str, values: str) -> bool:
    """Tell whether a run has one of the values, as text or as a number (8/255)."""
    if key == "grid":
        return run.tags.get(PARENT) in values.split(",")
    own = run.params.get(key)
    return any(own == value or number(own) == number(value) for value in values.split(","))


def number(text: str | None) -> float | str | None:
    """Read a number or a fraction; other words stay as they are."""
    top, slash, bottom = (text or "").partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        return text


def newest_of_each(runs: list[Run]) -> list[Run]:
    """Keep the newest run of equal settings, seed and data."""
    best: dict[object, Run] = {}
    for run in sorted(runs, key=lambda run: run.ended):
        data = run.tags.get("dataset_sha256", "")
        best[(tuple(sorted(run.settings.items())), run.seed, data)] = run
    return list(best.values())
