"""Judge a trained model again: ``python -m pipeline.evaluate RUN [key=value ...]``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.config.overrides import flatten, override, parse
from pipeline.context import best_device
from pipeline.data.class_names import check_same_classes
from pipeline.data.splits import Images, Source, Splits
from pipeline.distributed.sharded_evaluation import evaluate_model
from pipeline.evaluation.evaluator import Findings
from pipeline.evaluation.find_model import find, origin, read_source
from pipeline.evaluation.model_card import write_report
from pipeline.evaluation.outcome_cache import digest
from pipeline.evaluation.plan import (
    OPTIONS,
    PREFIXES,
    WHERE,
    Plan,
    open_outcome_cache,
    plan_jobs,
    read_plan,
)
from pipeline.measures import MEASURES
from pipeline.measures.corruptions import corrupted
from pipeline.measures.substitute import agreement, train_substitute
from pipeline.seeding import seed_of
from pipeline.storage.sync import storage_root
from pipeline.tracking.open_run import open_run

USAGE = f"""
usage: python -m pipeline.evaluate RUN [key=value ...] [--help]

Attack a trained model on its test images, and say whether the numbers can be believed. RUN is an
MLflow run id, latest (the newest finished run), or a checkpoint folder. The outcome is printed, and
tracked as a child of the run. What was found before, by a finished evaluation or one that was
killed, is not attacked again.

  tier=smoke|standard|full   500, 1,000 or all test images, and more attacks (default: standard)
  measure=a,b,...            these in place of the tier's, of
                             {", ".join(MEASURES)}
  attack=pgd|...             takes the place of PGD in them (an attack of the registry derived from
                             it, see docs/extending.md): measure=pgd attack=mi_fgsm
  checks=true|false          the attacks that only the sanity checks need (default: true, and false
                             with measure=)
  corruptions=true           accuracy under six kinds of corruption too, mean of severities 1 to 5
  transfer=RUN               attack with images made on another run's model too, such as the dense
                             twin's: ra_transfer, which counts into ra_worst
  substitute=true            attack with images made on a network that is trained on the model's
                             answers to training images: ra_substitute (default: in full)
  cascade=true               attack only what stands against the attacks before: ra_worst alone
  reuse=false                attack everything again
  batch=N                    images attacked at a time, and at most lost to a kill (default: 256)
  workers=N                  processes on Ray, one thread each (default: one for each GPU or core,
                             with 64 images each at least); the numbers are those of one
  evaluation.eps=4/255 evaluation.steps=100 evaluation.restarts=2 ...
  dataset.path, dataset.test_images (in place of the tier's number), experiment, storage,
  tracking_uri as in pipeline.train
"""


def run(argv: list[str]) -> int:
    """Read the command line, attack, print; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    if not given.names:
        raise ValueError("which run? give an MLflow run id, latest, or a checkpoint folder")
    settings = dict(given.settings)
    transfer = settings.pop("transfer", None)
    plan = read_plan({key: settings.pop(key) for key in OPTIONS if key in settings})
    allowed = {k: v for k, v in settings.items() if k.startswith(PREFIXES) or k in WHERE}
    if unknown := [key for key in settings if key not in allowed]:
        known = ", ".join((*OPTIONS, "transfer", *WHERE, *PREFIXES))
        raise ValueError(f"no key {unknown[0]!r}, only {known}*")
    here = {k: v for k, v in allowed.items() if k in WHERE}
    where = override(Config(batch_size=2 * parse("workers", here.get("workers", 1), int)), here)
    with tempfile.TemporaryDirectory() as scratch:
        folder, of = find(given.names[0], where, Path(scratch))
        try:
            model, trained = checkpoint.load_model(folder), checkpoint.load_config(folder)
            if transfer is not None:
                source = read_source(transfer, where, Path(scratch) / "transfer", trained.dataset)
                plan = replace(plan, transfer=source)
        except checkpoint.CheckpointError as error:
            return fail(str(error), 1)
        config = override(trained, {"workers": 1, "batch_size": 2 * where.workers, **allowed})
        config = replace(config, name=f"evaluate {trained.name}")
        if "workers" in here:
            plan = replace(plan, workers=where.workers)
        if plan.tier.steps is not None and "evaluation.steps" not in allowed:
            config = override(config, {"evaluation.steps": plan.tier.steps})
        if "dataset.test_images" in allowed:
            plan = replace(plan, tier=replace(plan.tier, images=None))
        return evaluate(config, model, folder, plan, of)


def evaluate(
    config: Config, model: Network, folder: Path, plan: Plan, of: Mapping[str, str]
) -> int:
    """Attack the test images of a config, print the table, and track it; returns the exit code."""
    try:
        splits = config.dataset.load(config.seed)
    except ValueError as error:
        return fail(str(error), 1)
    where = f"dataset {config.dataset.path or 'of the run'}"
    checkpoint.check_classes(folder, where, splits.class_names)
    if plan.transfer is not None:
        check_same_classes("transfer's model", plan.transfer.class_names, where, splits.class_names)
    weights = checkpoint.sha256(folder / "model.safetensors")
    follower, began = Follower(), time.monotonic()
    if plan.tier.substitute:
        plan = replace(plan, substitute=substitute_of(model, config, splits.train, follower))
    jobs = plan_jobs(config, splits.test, plan)
    store = open_outcome_cache(config, origin(config, folder), splits.test) if plan.reuse else None
    found = evaluate_model(config, model, plan, jobs, store, follower)
    if plan.corruptions:
        metrics = {**found.metrics, **corruption_metrics(model, jobs["main"].images, config.seed)}
        found = replace(found, metrics=metrics)
    tags = {"tier": plan.name, "weights_sha256": weights, **of}
    if plan.substitute is not None:
        device = best_device()
        nets = (plan.substitute, fold(model).to(device))
        share = agreement(*nets, jobs["main"].images, device)
        text = f"`ra_substitute` takes images made by PGD-{config.evaluation.steps} on a network "
        text += "that was trained on this model's labels of training images, and gives its label "
        text += f"to {share:.1%} of the test images."
        found = replace(found, notes=(*found.notes, text))
    if plan.transfer is not None:
        text = f"`ra_transfer` takes images made by PGD-{config.evaluation.steps} on the margin of "
        text += f"another model: run {plan.transfer.run}, network {plan.transfer.origin[:16]}."
        found = replace(found, notes=(*found.notes, text))
        tags |= {"transfer": plan.transfer.run, "transfer_network": plan.transfer.origin}
    took = time.monotonic() - began
    follower.results(
        f"{config.name}, {len(jobs['main'].images)} test images, {took:.0f} s", found.metrics
    )
    made = {"main": found.main, **found.extra}
    follower.efforts({name: verdicts.efforts for name, verdicts in made.items()})
    follower.verdict(found.verdict)
    track(config, plan, found, splits, follower, tags)
    return 0


def substitute_of(model: Network, config: Config, train: Source, follower: Follower) -> Network:
    """Train a network on the model's answers to the training images."""

    def tell(done: int, of: int, seconds: float) -> None:
        now = {"what": "a network learns the answers", "done": done, "of": of, "seconds": seconds}
        follower.handle({"kind": "judging", **now})

    device = best_device()
    return train_substitute(
        fold(model).to(device),
        train,
        config.evaluation.attack(1),
        num_classes=config.dataset.num_classes,
        seed=seed_of(config.seed, "substitute"),
        device=device,
        tell=tell,
    )


def corruption_metrics(model: Network, images: Images, seed: int) -> dict[str, float]:
    """Average the accuracy over the severities of each kind, and over the kinds."""
    hits = corrupted(model, images, seed=seed_of(seed, "test"), device=best_device())
    kinds = dict.fromkeys(kind for kind, _ in hits)
    means = {
        kind: sum(float(hits_N.float().mean()) for (k, _), hits_N in hits.items() if k == kind)
        / sum(k == kind for k, _ in hits)
        for kind in kinds
    }
    found = {f"corruption/{kind}": mean for kind, mean in means.items()}
    return found | {"corruption/mean": sum(means.values()) / len(means)}


def track(
    config: Config,
    plan: Plan,
    found: Findings,
    splits: Splits,
    follower: Follower,
    tags: Mapping[str, str],
) -> None:
    """Write the report, and a run in MLflow that continues where these settings were before."""
    chosen = [sorted(found.metrics), len(found.job.images), plan.cascade]
    key = json.dumps([flatten(config), dict(tags), chosen], sort_keys=True)
    root = storage_root(config.storage) / config.experiment
    home = root / f"{config.name}-{digest(key)[:8]}"
    tracker = open_run(config, home, tags)
    write_report(config, found, home, class_names=splits.class_names, sha256=splits.sha256)
    (home / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
    tracker.handle({"kind": "metrics", "step": 0, "values": {**found.metrics, **found.main.pace}})
    for name, text in found.verdict.tags.items():
        tracker.handle({"kind": "tag", "key": name, "value": text})
    tracker.handle({"kind": "artifacts", "folder": str(home)})
    if not tracker.close("finished"):
        follower.say("warning: MLflow does not have everything yet; the same command sends it")
    follower.say(f"run {tracker.run_id}; card and plots in {home}")
    follower.say(f"see it with: {tracker.ui_hint()}")


if __name__ == "__main__":
    sys.exit(main(run))
