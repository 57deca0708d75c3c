"""Judge defences that fool an evaluation as ``pipeline.evaluate`` would, and print what it says.

``python -m tests.helpers.defence_table WEAK ROBUST MIXTURE [tier=standard] [images=120]
[measure=...] [only=a,b]``: checkpoint folders, on the digits, of a dense network trained without an
attack, of a robust one, and of a mixture with one router. With ``measure=`` only these attacks and
the checks are made, with ``only=`` only the defences whose names hold one of these words. The last
column but one is what stands against PGD on the margin of the first network, judged on the defence:
the simple attack on those that hide it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.config import Config, override
from pipeline.data.augmentation import to_float
from pipeline.data.digits import Digits
from pipeline.data.splits import Images
from pipeline.evaluation.evaluator import Findings, examine
from pipeline.evaluation.plan import plan_jobs, read_plan
from pipeline.measures.noise_and_transfer import Transfer
from pipeline.measures.runner import judge
from pipeline.seeding import seed_of
from tests.helpers import defences

CPU = torch.device("cpu")


def defended(weak: Path, robust: Path, mixture: Path) -> dict[str, Callable[[], Network]]:
    """Make each defence of trained networks; the last are the networks as they are."""

    def net(folder: Path) -> Network:
        return checkpoint.load_model(folder).eval()

    train = Digits().load(0).train
    assert isinstance(train, Images)
    seen, labels = to_float(train.pixels_NCHW), train.labels_N

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
        "a code and a random map": lambda: defences.coded(net(weak)),
        "a bonus for the answer": lambda: defences.bonus(net(weak)),
        "a coloured backdoor": lambda: defences.backdoor(net(weak), net(robust)),
        "a factor on the logits": lambda: defences.tempered(net(weak)),
        "noise where it is close": lambda: defences.shy(net(weak)),
        "ripples on the pixels": lambda: defences.shattered(net(weak)),
        "a hashed gate": lambda: defences.hashed(net(weak), net(robust)),
        "a gate by distance": lambda: defences.known(net(weak), net(robust), seen),
        "a table of images": lambda: defences.table(net(weak), seen, labels),
        "a code where it is rough": lambda: defences.detected(net(weak)),
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


def simple_attack(model: Network, inner: Network, config: Config, images: int) -> float:
    """Attack the margin of another network; the share that the defence still gets right."""
    test = config.dataset.load(config.seed).test.pick(torch.arange(images))
    attack = config.evaluation.attack(config.evaluation.steps)
    measure = {"ra_transfer": Transfer(source=fold(inner), attack=attack)}
    found = judge(model, test, measure, seed=seed_of(config.seed, "test"), device=CPU)
    return float(found.correct["ra_transfer"].float().mean())


def run(words: list[str]) -> None:
    """Print a row for each defence."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    weak, robust, mixture = (Path(word) for word in words if "=" not in word)
    images = int(options.pop("images", "120"))
    torch.set_num_threads(1)
    words_of = options.pop("only", "").split(",")
    print("| defence | PGD | worst case | its verdict | checks that fail | inside | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, make in defended(weak, robust, mixture).items():
        if not any(word in name for word in words_of):
            continue
        model, began = make(), time.monotonic()
        config = checkpoint.load_config(mixture if model.num_experts > 1 else robust)
        found = judged(model, override(config, {"workers": 1}), options, images)
        failed = ", ".join(check.name for check in found.verdict.checks if check.status == "fail")
        plain = found.metrics[f"test/ra_pgd{config.evaluation.steps}"]
        worst, took = found.metrics["test/ra_worst"], time.monotonic() - began
        inside = simple_attack(model, checkpoint.load_model(weak).eval(), config, images)
        shares = (f"{100 * share:.1f}" for share in (plain, worst))
        row = (name, *shares, found.verdict.worst, failed, f"{100 * inside:.1f}")
        print(f"| {' | '.join(row)} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
