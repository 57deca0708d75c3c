"""The front of a sweep, and its members' only meeting with the test split."""

from __future__ import annotations

from dataclasses import replace

from pipeline import checkpoint
from pipeline.cli.console import Follower
from pipeline.config.overrides import override
from pipeline.distributed.sharded_evaluation import evaluate_model
from pipeline.evaluation.find_model import origin
from pipeline.evaluation.model_card import write_report
from pipeline.evaluation.plan import open_outcome_cache, plan_jobs, read_plan
from pipeline.sweep.pareto import undominated
from pipeline.tracking.open_run import open_run
from pipeline.tune.trial_log import TrialLog, TrialRecord

TIER = "standard"


def front(log: TrialLog) -> list[TrialRecord]:
    """List the finished trials that none beats, by the second objective: the most robust first."""
    aims = log.request.space.objectives
    done = [entry for entry in log.entries if entry.status == "finished"]
    whole = [entry for entry in done if all(name in entry.metrics for name, _ in aims)]
    signs = {"max": 1.0, "min": -1.0}
    points = [[signs[mode] * entry.metrics[name] for name, mode in aims] for entry in whole]
    best = [whole[place] for place in undominated(points)]
    name, mode = aims[min(1, len(aims) - 1)]
    return sorted(best, key=lambda entry: signs[mode] * entry.metrics[name], reverse=True)


def judge_finalists(log: TrialLog, follower: Follower) -> None:
    """Put the first of the front through the standard tier on the test split, each once.

    What is found becomes ``test/*`` of the trial's own run. Outcomes are kept image by image: a
    process that was killed goes on.
    """
    for entry in front(log)[: log.request.finalists]:
        if "test/ra_worst" in entry.metrics:
            continue
        follower.say(f"[{entry.trial}] on the test split, {TIER} tier")
        entry.metrics |= judge(log, entry, follower)
        log.write()


def judge(log: TrialLog, entry: TrialRecord, follower: Follower) -> dict[str, float]:
    """Attack the test images of one trial's model; return what is found."""
    folder = log.request.trial_folder(entry.trial)
    best = folder / "checkpoints" / "best"
    config = checkpoint.load_config(best)
    plan = replace(read_plan({"tier": TIER}), workers=1)
    config = override(config, {"workers": 1})
    splits, model = config.dataset.load(config.seed), checkpoint.load_model(best)
    checkpoint.check_classes(best, "the dataset", splits.class_names)
    jobs = plan_jobs(config, splits.test, plan)
    store = open_outcome_cache(config, origin(config, best), splits.test)
    found = evaluate_model(config, model, plan, jobs, store, follower)
    follower.results(f"{log.request.name}-{entry.trial}, test split", found.metrics)
    follower.verdict(found.verdict)
    tracker = open_run(config, folder, {"judged": TIER})
    home = folder / "judged"
    write_report(config, found, home, class_names=splits.class_names, sha256=splits.sha256)
    tracker.handle({"kind": "metrics", "step": 0, "values": found.metrics})
    for name, text in found.verdict.tags.items():
        tracker.handle({"kind": "tag", "key": name, "value": text})
    tracker.handle({"kind": "artifacts", "folder": str(home)})
    tracker.close("finished")
    return dict(found.metrics)
