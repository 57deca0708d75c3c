"""Judge a trained model again: ``python -m pipeline.evaluate RUN [key=value ...]``."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe.network import Network
from pipeline import checkpoint
from pipeline.command import fail, main, read_arguments
from pipeline.config import Config, flatten, override, parse
from pipeline.console import Follower
from pipeline.data.loading import Images, take
from pipeline.measures import END_OF_RUN, ROUTED, Measure
from pipeline.measures.judging import Verdicts, judge, suite, summarize
from pipeline.seeding import seed_of
from pipeline.session import best_device
from pipeline.tracking import EVALUATED, Tracker, download, resolve_run
from pipeline.train import commit, ray_cluster

USAGE = f"""
usage: python -m pipeline.evaluate RUN [key=value ...] [--help]

Attack a trained model on its test images. RUN is an MLflow run id, latest (the newest finished
run), or a checkpoint folder. The outcome is printed, and tracked as a child of the run.

  tier=smoke|standard|full   500, 1,000 or all test images; smoke runs PGD-20 only (default: full)
  measure=a,b,...            of {", ".join(END_OF_RUN)}
  workers=N                  shards on Ray; the numbers are those of one worker
  evaluation.eps=4/255 evaluation.steps=100 evaluation.restarts=2 ...
  dataset.path, dataset.test_images, experiment, storage, tracking_uri as in pipeline.train
"""
PREFIXES = ("evaluation.", "dataset.path", "dataset.test_images")
WHERE = ("experiment", "storage", "tracking_uri", "workers")


@dataclass(frozen=True)
class Plan:
    """How thorough an evaluation is: test images (None: all), and a limit on the attacks' steps."""

    images: int | None
    measures: tuple[str, ...]
    steps: int | None = None


TIERS = {
    "smoke": Plan(500, ("sa", "ra_pgd"), 20),
    "standard": Plan(1000, tuple(END_OF_RUN)),
    "full": Plan(None, tuple(END_OF_RUN)),
}


def run(argv: list[str]) -> int:
    """Read the command line, attack, print; returns the exit code."""
    given = read_arguments(argv, usage=USAGE)
    if not given.names:
        raise ValueError("which run? give an MLflow run id, latest, or a checkpoint folder")
    settings = dict(given.settings)
    plan, tier = read_plan(settings)
    allowed = {k: v for k, v in settings.items() if k.startswith(PREFIXES) or k in WHERE}
    if unknown := [key for key in settings if key not in allowed]:
        raise ValueError(
            f"no key {unknown[0]!r}, only tier, measure, {', '.join((*WHERE, *PREFIXES))}*"
        )
    here = {k: v for k, v in allowed.items() if k in WHERE}
    where = override(Config(batch_size=2 * parse("workers", here.get("workers", 1), int)), here)
    with tempfile.TemporaryDirectory() as scratch:
        folder, of = find(given.names[0], where, Path(scratch))
        try:
            model = checkpoint.load_model(folder)
        except checkpoint.CheckpointError as error:
            return fail(str(error), 1)
        trained = checkpoint.load_config(folder)
        config = override(trained, {"workers": 1, "batch_size": 2 * where.workers, **allowed})
        config = replace(config, name=f"evaluate {trained.name}")
        if plan.steps is not None and "evaluation.steps" not in allowed:
            config = override(config, {"evaluation.steps": plan.steps})
        return evaluate(config, model, folder, plan, {"tier": tier} | of)


def read_plan(settings: dict[str, str]) -> tuple[Plan, str]:
    """Take ``tier`` and ``measure`` out of the settings."""
    tier = parse("tier", settings.pop("tier", "full"), str)
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    plan = TIERS[tier]
    if "measure" in settings:
        names = tuple(settings.pop("measure").split(","))
        if unknown := [name for name in names if name not in END_OF_RUN]:
            raise ValueError(f"measure must be of {', '.join(END_OF_RUN)}, got {unknown[0]!r}")
        plan = replace(plan, measures=names)
    return plan, tier


def find(name: str, where: Config, scratch: Path) -> tuple[Path, dict[str, str]]:
    """Return the checkpoint folder that a name stands for, and the tags that say what it is."""
    if Path(name).exists():
        return Path(name), {EVALUATED: str(Path(name).resolve())}
    run = resolve_run(where.tracking_uri, name, where.experiment)
    folder = download(where.tracking_uri, run, "checkpoints/best", scratch, where.experiment)
    return folder, {EVALUATED: run, "mlflow.parentRunId": run}


def evaluate(
    config: Config, model: Network, folder: Path, plan: Plan, tags: Mapping[str, str]
) -> int:
    """Attack the test images of a config, print the table, and track it; returns the exit code."""
    try:
        test = config.dataset.load(config.seed).test
    except ValueError as error:
        return fail(str(error), 1)
    if plan.images is not None:
        test = take(test, min(plan.images, len(test)), config.seed)
    dense = config.backbone.num_experts == 1
    every = suite(config.evaluation, dense=dense)
    names = dict(zip(measured(dense), every, strict=True))
    chosen = {names[name]: every[names[name]] for name in plan.measures if name in names}
    if not chosen:
        raise ValueError(f"measure must be of {', '.join(names)} for a dense net, got others")
    began = time.monotonic()
    verdicts = shards(config, model, test, chosen)
    metrics = summarize(verdicts, config.backbone.num_experts, "test")
    took = time.monotonic() - began
    follower = Follower()
    follower.results(f"{config.name}, {len(test)} test images, {took:.0f} s", metrics)
    key = json.dumps([flatten(config), dict(tags), sorted(chosen), len(test)], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:8]
    home = Path(config.storage).resolve() / config.experiment / f"{config.name}-{name}"
    tracker = Tracker.open(
        home,
        tracking_uri=config.tracking_uri,
        experiment=config.experiment,
        name=config.name,
        params={k: str(v) for k, v in flatten(config).items()},
        tags={
            "commit": commit(),
            "weights_sha256": checkpoint.sha256(folder / "model.safetensors"),
            **tags,
        },
    )
    tracker.handle({"kind": "metrics", "step": 0, "values": metrics})
    tracker.close("finished")
    follower.say(f"run {tracker.run_id}; see it with: {tracker.ui_hint()}")
    return 0


def measured(dense: bool) -> list[str]:
    """Name the measures of ``suite`` as the registry does, in its order."""
    return [name for name in END_OF_RUN if not (dense and name in ROUTED)]


def shards(
    config: Config, model: Network, test: Images, measures: Mapping[str, Measure]
) -> Verdicts:
    """Judge in this process, or in shards on Ray; the verdicts are the same."""
    seed = seed_of(config.seed, "test")
    if config.workers == 1:
        return judge(model, test, measures, seed=seed, device=best_device())
    import ray

    def shard(rank: int, net: Network, images: Images, how: Mapping[str, Measure]) -> Verdicts:
        torch.set_num_threads(1)
        device = best_device()
        return judge(
            net.to(device), images, how, seed=seed, device=device, rank=rank, world=config.workers
        )

    with ray_cluster(config):
        task = ray.remote(num_cpus=1)(shard)
        net, images = ray.put(model), ray.put(test)
        parts = [task.remote(rank, net, images, dict(measures)) for rank in range(config.workers)]
        done: list[Verdicts] = ray.get(parts)
    correct = {m: torch.stack([p.correct[m] for p in done]).any(0) for m in measures}
    routes = [
        torch.stack([getattr(p, r) for p in done]).sum(0) for r in ("route", "route_attacked")
    ]
    return Verdicts(correct, routes[0], routes[1])


if __name__ == "__main__":
    sys.exit(main(run))
