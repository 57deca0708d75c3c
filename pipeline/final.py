"""The end of a run: the best model, judged once on the test split, with its cost and pictures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe.cost import cost
from moe.diagnostics import class_load
from moe.folding import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config, flatten
from pipeline.data.loading import Splits, take
from pipeline.measures.judging import Verdicts, judge, over_eps, suite, summarize
from pipeline.plots import plot_accuracies, plot_class_load, plot_losses, plot_over_eps
from pipeline.seeding import seed_of
from pipeline.session import Session

OVER_EPS_IMAGES = 500
TIMED_IMAGES = 128


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

    def tell(done: int, of: int) -> None:
        session.tell("judging", done=done, of=of, seconds=time.monotonic() - began)

    verdicts = judge(
        model,
        splits.test,
        suite(config.evaluation, dense=config.backbone.num_experts == 1),
        seed=seed_of(config.seed, "test"),
        device=session.device,
        rank=session.rank,
        world=session.world,
        total=session.total,
        tell=tell,
    )
    metrics = summarize(verdicts, config.backbone.num_experts, "test")
    if session.rank == 0:
        metrics |= costs(config, model)
        draw(config, folder, session, splits, history, model, verdicts)
        (folder / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
        (folder / "card.md").write_text(card(config, metrics, len(splits.test), splits.sha256))
        session.tell("metrics", step=int(meta["update"]), values=metrics)
        session.tell("artifacts", folder=str(folder))
    session.wait()
    return metrics


def draw(
    config: Config,
    folder: Path,
    session: Session,
    splits: Splits,
    history: Sequence[Mapping[str, Any]],
    model: Network,
    verdicts: Verdicts,
) -> None:
    """Write the plots of a run to ``plots/``."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    plot_losses(history, plots / "losses.png")
    plot_accuracies(history, plots / "accuracies.png")
    few = take(splits.test, min(OVER_EPS_IMAGES, len(splits.test)), config.seed)
    seed = seed_of(config.seed, "over_eps")
    points = over_eps(model, few, config.evaluation, seed=seed, device=session.device)
    unit = "1/255" if config.evaluation.norm == "linf" else "L2"
    plot_over_eps(points, plots / "accuracy_over_eps.png", unit=unit)
    if config.backbone.num_experts > 1:
        experts, classes = config.backbone.num_experts, config.dataset.num_classes
        table_KE = class_load(verdicts.route, splits.test.labels_N, experts, classes)
        plot_class_load(table_KE, splits.class_names, plots / "class_load.png")


def costs(config: Config, model: Network) -> dict[str, float]:
    """Count the model's cost, and time it beside its dense twin (ratio 1, one expert)."""
    size = config.dataset.image_size
    dense = replace(config.backbone, num_experts=1, ratio=1.0)  # type: ignore[type-var]
    twin = dense.build(config.dataset.num_classes, size).to(memory_format=torch.channels_last)
    twin = twin.to(next(model.parameters()).device).eval()
    own, full = cost(model, size), cost(twin, size)
    pace, pace_dense = images_per_second([fold(model), fold(twin)], size)
    return {
        "cost/gmac": own.gmac,
        "cost/gmac_router": own.gmac_router,
        "cost/params": own.params,
        "cost/ratio_to_dense": own.gmac / full.gmac,
        "cost/images_per_second": pace,
        "cost/images_per_second_dense": pace_dense,
    }


def images_per_second(models: Sequence[Network], size: int, rounds: int = 5) -> list[float]:
    """Time the models in turn on the same random images; return the median pace of each."""
    device = next(models[0].parameters()).device
    x_BCHW = torch.rand(TIMED_IMAGES, 3, size, size, device=device)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(rounds + 1):
            for model, own in zip(models, times, strict=True):
                own.append(seconds(lambda model=model: model(x_BCHW), device))  # type: ignore[misc]
    return [TIMED_IMAGES / sorted(own[1:])[rounds // 2] for own in times]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time a piece of work, to the end of what it started on the device."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def card(config: Config, metrics: Mapping[str, float], images: int, sha256: str) -> str:
    """Describe a model in Markdown: what it is, how it does, under which conditions."""
    lines = [f"# {config.name}", "", "| metric | value | 95% interval |", "|---|---|---|"]
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        band = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
        shown = "" if None in band else f"{band[0]:.4f} to {band[1]:.4f}"
        lines.append(f"| {name} | {value:.6g} | {shown} |")
    threat = config.evaluation
    lines += [
        "",
        f"Test images: {images}; each counted once, an image misclassified without an attack as "
        f"broken. Threat: {threat.norm}, eps {threat.eps:.6g}, {threat.steps} steps of "
        f"{threat.step_size:.6g}, {threat.restarts} start(s), by the true gradient of the "
        "deployed model, whose gates are hard; `ra_worst` is the share that stands against all of "
        "them. "
        "Model selected on the validation split by RA under PGD-"
        f"{threat.validation_steps}; the test split was used once.",
        "",
        f"Seed {config.seed}, {config.workers} worker(s), torch {torch.__version__}, "
        f"{platform.machine()}, data sha256 {sha256[:16]}, fingerprint {config.fingerprint[:16]}.",
        "",
        "```json",
        json.dumps(flatten(config), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)
