"""The end of a run: the best model, judged once on the test split, with its cost and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe.backbones import dense_twin
from moe.cost import cost
from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config.overrides import flatten
from pipeline.context import Session
from pipeline.data.splits import Splits
from pipeline.evaluation.evaluator import Findings, Job, examine, main_job, side_jobs
from pipeline.evaluation.model_card import write_report
from pipeline.evaluation.plots import plot_accuracies, plot_losses
from pipeline.measures.runner import Verdicts, judge, suite, summarize
from pipeline.measures.tiers import END, TIERS, measures_of
from pipeline.seeding import seed_of

TIMED_IMAGES = 128
TIMED_GMAC = 128.0  # of the dense twin in one round on a CPU: the dearest nets are timed on fewer


def finish(
    config: Config,
    folder: Path,
    session: Session,
    splits: Splits,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Judge the best checkpoint on the test split; write plots, ``card.md`` and ``config.json``."""
    best = folder / "checkpoints" / "best"
    meta = checkpoint.verify(best)
    model = checkpoint.load_model(best).to(session.device)
    began = time.monotonic()

    def tell(done: int, of: int, name: str) -> None:
        spent = time.monotonic() - began
        session.tell("judging", what=name, done=done, of=of, seconds=spent)

    seed, device = seed_of(config.seed, "test"), session.device
    dense = config.backbone.num_experts == 1
    job = main_job(splits.test, END, suite(config.evaluation, dense=dense))
    main = judge(
        model,
        job.images,
        job.measures,
        seed=seed,
        device=device,
        rank=session.rank,
        world=session.world,
        total=session.total,
        tell=tell,
    )
    metrics = summarize(main, config.backbone.num_experts, "test")
    if session.rank == 0:

        def alone(side: Job) -> Verdicts:
            return judge(
                model, side.images, side.measures, seed=seed, device=device, ids_N=side.ids_N
            )

        jobs = side_jobs(config, job, END, curve_steps=config.evaluation.validation_steps)
        sides = {name: alone(side) for name, side in jobs.items()}
        found = examine(config, model, "end of a run", job, main, sides, device)
        metrics = {**found.metrics, **costs(config, model)}
        draw(config, folder, replace(found, metrics=metrics), splits, history)
        (folder / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
        session.kept()
        session.tell("metrics", step=int(meta["update"]), values=metrics)
        for key, text in found.verdict.tags.items():
            session.tell("tag", key=key, value=text)
        session.tell("artifacts", folder=str(folder))
    session.wait()
    return metrics


def draw(
    config: Config,
    folder: Path,
    found: Findings,
    splits: Splits,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write the card and the plots of a run."""
    write_report(config, found, folder, class_names=splits.class_names, sha256=splits.sha256)
    plot_losses(history, folder / "plots" / "losses.png")
    plot_accuracies(history, folder / "plots" / "accuracies.png")


def costs(config: Config, model: Network) -> dict[str, float]:
    """Count the model's cost, and time it beside its dense twin (ratio 1, one expert)."""
    size = config.dataset.image_size
    twin = (
        dense_twin(config.backbone)
        .build(config.dataset.num_classes, size)
        .to(memory_format=torch.channels_last)
    )
    twin = twin.to(next(model.parameters()).device).eval()
    own, full = cost(model, size), cost(twin, size)
    count = TIMED_IMAGES
    if next(model.parameters()).device.type == "cpu":
        count = max(8, min(count, int(TIMED_GMAC / full.gmac)))
    pace, pace_dense = images_per_second([fold(model), fold(twin)], size, count)
    return {
        "cost/gmac": own.gmac,
        "cost/gmac_router": own.gmac_router,
        "cost/params": own.params,
        "cost/ratio_to_dense": own.gmac / full.gmac,
        "cost/images_per_second": pace,
        "cost/images_per_second_dense": pace_dense,
    }


def images_per_second(
    models: Sequence[Network], size: int, count: int = TIMED_IMAGES, rounds: int = 5
) -> list[float]:
    """Time the models in turn on the same random images; return the median pace of each."""
    device = next(models[0].parameters()).device
    x_BCHW = torch.rand(count, 3, size, size, device=device)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(rounds + 1):
            for model, own in zip(models, times, strict=True):
                own.append(seconds(lambda model=model: model(x_BCHW), device))  # type: ignore[misc]
    return [count / sorted(own[1:])[rounds // 2] for own in times]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time a piece of work, to the end of what it started on the device."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


TIER = TIERS["smoke"]


def tryout(
    config: Config,
    folder: Path,
    session: Session,
    splits: Splits,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Judge the best checkpoint by the smoke tier's attacks, a forced route among them.

    Takes the place of ``final.finish`` for models that are to be compared: whoever chooses by test
    images has none left to report. What it finds is the last point of ``val/sa`` and ``val/ra``
    (PGD with the tier's steps in place of the epochs' shorter attack), and ``val/ra_forced`` and
    ``val/ra_worst``.
    """
    best = folder / "checkpoints" / "best"
    model = checkpoint.load_model(best).to(session.device)
    steps = min(TIER.steps or config.evaluation.steps, config.evaluation.steps)
    threat, experts = replace(config.evaluation, steps=steps), config.backbone.num_experts
    measures = measures_of(TIER.measures, threat, num_experts=experts)
    job, began = main_job(splits.validation, TIER, measures), time.monotonic()

    def tell(done: int, of: int, measure: str) -> None:
        session.tell("judging", done=done, of=of, seconds=time.monotonic() - began)

    verdicts = judge(
        model,
        job.images,
        job.measures,
        seed=seed_of(config.seed, "validation"),
        device=session.device,
        rank=session.rank,
        world=session.world,
        total=session.total,
        tell=tell,
        ids_N=job.ids_N,
    )
    found = summarize(verdicts, experts, "val")
    metrics = {name.replace(f"val/ra_pgd{steps}", "val/ra"): v for name, v in found.items()}
    metrics["val/images"] = float(len(job.images))
    if session.rank == 0:
        (folder / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
        session.tell("metrics", step=int(history[-1]["step"]) + 1, values=metrics)
        session.tell("artifacts", folder=str(folder))
    session.wait()
    return metrics
