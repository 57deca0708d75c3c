"""Judge defences that fool an evaluation as ``pipeline.evaluate`` would, and print what it says.

``python -m tests.helpers.defence_table WEAK ROBUST MIXTURE [tier=standard] [images=120]
[measure=...]``: checkpoint folders of a dense network trained without an attack, of a robust one,
and of a mixture with one router. With ``measure=`` only these attacks and the checks are made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config, override
from pipeline.evaluation.evaluator import Findings, examine
from pipeline.evaluation.plan import plan_jobs, read_plan
from pipeline.measures.runner import judge
from pipeline.seeding import seed_of
from tests.helpers import defences

CPU = torch.device("cpu")


def defended(weak: Path, robust: Path, mixture: Path) -> dict[str, Callable[[], Network]]:
    """Make each defence of trained networks; the last are the networks as they are."""

    def net(folder: Path) -> Network:
        return checkpoint.load_model(folder).eval()

    def scaled(factor: float) -> Network:
        inner = net(robust)
        return defences.dense(lambda x: factor * inner(x).logits, inner)

    return {
        "gate on the 8-bit grid": lambda: defences.grid_gate(net(weak), net(robust)),
        "4-bit pixels and a hint": lambda: defences.hinted(net(weak), net(robust), bits=4),
        "2-bit pixels and a hint": lambda: defences.hinted(net(robust), net(weak), bits=2),
        "permuted gradient": lambda: defences.hard_gradient(net(weak), defences.Permuted.apply),
        "turned gradient": lambda: defences.hard_gradient(net(weak), defences.Turned.apply),
        "logits x 1e4": lambda: scaled(1e4),
        "logits / 1e4": lambda: scaled(1e-4),
        "router on 2-bit pixels": lambda: defences.rounded_router(net(mixture)),
        "none, robust": lambda: net(robust),
        "none, mixture": lambda: net(mixture),
    }


def judged(model: Network, config: Config, options: dict[str, str], images: int) -> Findings:
    """Make the attacks and checks of a plan on the first test images."""
    test = config.dataset.load(config.seed).test
    test = test.pick(torch.arange(min(images, len(test))))
    plan = read_plan(options)
    if "measure" in options:
        few = replace(plan.tier, probed=images, curve=0, planted=0, deep=False)
        plan = replace(plan, tier=few, checks=True)
    jobs = {name: job for name, job in plan_jobs(config, test, plan).items() if len(job.images)}
    seed = seed_of(config.seed, "test")
    found = {
        name: judge(model, job.images, job.measures, seed=seed, device=CPU, ids_N=job.ids_N)
        for name, job in jobs.items()
    }
    main = found.pop("main")
    return examine(config, model, plan.name, jobs["main"], main, found, CPU)


def run(words: list[str]) -> None:
    """Print a row for each defence."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    weak, robust, mixture = (Path(word) for word in words if "=" not in word)
    images = int(options.pop("images", "120"))
    torch.set_num_threads(1)
    print("| defence | PGD | worst case | its verdict | checks that fail | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, make in defended(weak, robust, mixture).items():
        model, began = make(), time.monotonic()
        config = checkpoint.load_config(mixture if model.num_experts > 1 else robust)
        found = judged(model, override(config, {"workers": 1}), options, images)
        failed = ", ".join(check.name for check in found.verdict.checks if check.status == "fail")
        plain = found.metrics[f"test/ra_pgd{config.evaluation.steps}"]
        worst, took = found.metrics["test/ra_worst"], time.monotonic() - began
        row = (name, f"{100 * plain:.1f}", f"{100 * worst:.1f}", found.verdict.worst, failed)
        print(f"| {' | '.join(row)} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
