"""Mix two runs as a dual model: ``python -m pipeline.dual STANDARD ROBUST [key=value ...]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe.dual_model import Mix, check_mix
from pipeline import checkpoint
from pipeline.cli.arguments import fail, main, read_arguments
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.config.overrides import flatten, override, parse
from pipeline.data.class_names import check_same_classes
from pipeline.dual.alpha_curve import Curve, as_markdown, plot_trade_off, write_csv
from pipeline.dual.attack import AlphaSweep, Half, attacked, check_same, read_half, split
from pipeline.evaluation.outcome_cache import digest
from pipeline.evaluation.plan import OPTIONS, PREFIXES, WHERE, read_plan
from pipeline.measures import END_OF_RUN
from pipeline.storage.sync import storage_root
from pipeline.tracking import EVALUATED
from pipeline.tracking.open_run import open_run

ALPHAS = ",".join(f"{tenths / 10:g}" for tenths in range(11))
USAGE = f"""
usage: python -m pipeline.dual STANDARD ROBUST [key=value ...] [--help]
       python -m pipeline.dual JOINT [key=value ...]

Mix two trained models, (1 - alpha) F_S + alpha F_R, and attack the mixture at each alpha; or do so
with the halves of a run that trained both (algorithm=jtdmoe). Writes a table (CSV, Markdown) and a
plot of standard against worst robust accuracy, and tracks them. A run is an MLflow run id, latest,
or a checkpoint folder. What was found before is not attacked again.

  alpha=0,0.5,1              weights of the robust model (default: {ALPHAS}); 0 and 1 are the single
                             models, attacked as what they are
  mix=probabilities|logits   what is mixed (default: that of joint, else probabilities)
  joint=RUN                  draw a jointly trained dual model over the same weights too
  beside=RUN,RUN             draw these single models too, attacked alike
  transfer=true|false        images made on either half alone, as an attack (default: true)
  measure=a,b,...            of those of pipeline.evaluate (default: {",".join(END_OF_RUN)})
  tier, checks, cascade, reuse, batch, workers, evaluation.*, dataset.path, dataset.test_images,
  experiment, storage, tracking_uri as in pipeline.evaluate
"""
OWN = ("alpha", "mix", "joint", "beside", "transfer")


def run(argv: list[str]) -> int:
    """Read the command line, attack at each weight, write and track; returns the exit code."""
    given = read_arguments(argv, usage=USAGE, most_names=2)
    if not given.names:
        raise ValueError("which runs? give a standard and a robust one, or one trained jointly")
    settings = dict(given.settings)
    own = {key: settings.pop(key) for key in OWN if key in settings}
    options = {key: settings.pop(key) for key in OPTIONS if key in settings}
    if "tier" not in options:
        options.setdefault("measure", ",".join(END_OF_RUN))
    if "substitute" in options:
        raise ValueError("substitute is an option of pipeline.evaluate, on a single model")
    plan = read_plan(options)
    if unknown := [k for k in settings if not (k.startswith(PREFIXES) or k in WHERE)]:
        known = ", ".join((*OWN, *OPTIONS, *WHERE, *PREFIXES))
        raise ValueError(f"no key {unknown[0]!r}, only {known}*")
    if "dataset.test_images" in settings:
        plan = replace(plan, tier=replace(plan.tier, images=None))
    if plan.tier.steps is not None:
        settings.setdefault("evaluation.steps", str(plan.tier.steps))
    here = {k: v for k, v in settings.items() if k in WHERE}
    where = override(Config(batch_size=2 * parse("workers", here.get("workers", 1), int)), here)
    if "workers" in here:
        plan = replace(plan, workers=where.workers)
    alphas = read_alphas(own.get("alpha", ALPHAS))
    names = list(given.names) if len(given.names) == 2 else []
    joint = own.get("joint") if names else given.names[0]
    if not names and "joint" in own:
        raise ValueError(f"joint={own['joint']} goes with a standard and a robust run, got one run")
    try:
        halves = [read_half(name, where) for name in names]
        both = read_half(joint, where) if joint else None
        beside = [read_half(name, where) for name in filter(None, own.get("beside", "").split(","))]
    except checkpoint.CheckpointError as error:
        return fail(str(error), 1)
    known = getattr(both.config.backbone, "mix", "") if both else ""
    mix: Mix = parse("mix", own.get("mix", known or "probabilities"), Mix)
    sweep = AlphaSweep(alphas, mix, plan, parse("transfer", own.get("transfer", True), bool))
    changes = {"workers": 1, "batch_size": 2 * where.workers, **settings}
    return draw(halves, both, beside, sweep, changes)


def read_alphas(text: str) -> tuple[float, ...]:
    """Read the weights, in ascending order."""
    alphas = sorted({parse("alpha", part, float) for part in text.split(",")})
    for alpha in alphas:
        check_mix(alpha, "logits")
    return tuple(alphas)


def draw(
    halves: Sequence[Half],
    both: Half | None,
    beside: Sequence[Half],
    sweep: AlphaSweep,
    changes: dict[str, Any],
) -> int:
    """Attack every mixture of the pairs; write the table and the plot, and track them."""
    pairs: dict[str, tuple[Half, Half]] = {}
    if halves:
        pairs["post hoc"] = (halves[0], halves[1])
    if both is not None:
        pairs["joint"] = split(both)
    base = next(iter(pairs.values()))[1].config
    for half in (*(half for pair in pairs.values() for half in pair), *beside):
        check_same(half.config, base)
    if len({*pairs, *(half.config.name for half in beside)}) < len(pairs) + len(beside):
        names = ", ".join(half.config.name for half in beside)
        raise ValueError(f"beside must be runs of different names, not {', '.join(pairs)}: {names}")
    config = override(base, changes)
    try:
        splits = config.dataset.load(config.seed)
    except ValueError as error:
        return fail(str(error), 1)
    for half in (*(half for pair in pairs.values() for half in pair), *beside):
        check_same_classes(half.config.name, half.class_names, "the dataset", splits.class_names)
    follower, curves = Follower(), []
    for name, (standard, robust) in pairs.items():
        points = []
        for point in attacked(standard, robust, sweep, config, splits.test, follower):
            follower.say(f"{name}, alpha {point.alpha:g}: {point.headline}")
            points.append(point)
        own = both.config.backbone.alpha if both and name == "joint" else None  # type: ignore[attr-defined]
        curves.append(Curve(name, tuple(points), own))
    alone = replace(sweep, alphas=(1.0,))
    for half in beside:
        (point,) = attacked(half, half, alone, config, splits.test, follower)
        follower.say(f"{half.config.name}: {point.headline}")
        curves.append(Curve(half.config.name, (point,), single=True))
    runs = dict(zip(("dual_standard", "dual_robust"), (h.name for h in halves), strict=False))
    runs |= {"dual_joint": both.name} if both else {}
    runs |= {"dual_beside": " ".join(half.name for half in beside)} if beside else {}
    track(config, runs, sweep, curves, follower)
    return 0


def track(
    config: Config,
    runs: dict[str, str],
    sweep: AlphaSweep,
    curves: Sequence[Curve],
    follower: Follower,
) -> None:
    """Write table and plot, and a run in MLflow whose steps are thousandths of alpha."""
    tags = runs | {EVALUATED: " ".join(runs.values()), "mix": sweep.mix}
    asked = [flatten(config), tags, sweep.alphas, sorted(curves[0].points[0].metrics)]
    root = storage_root(config.storage) / config.experiment
    home = root / f"dual {config.name}-{digest(json.dumps(asked, sort_keys=True))[:8]}"
    (home / "plots").mkdir(parents=True, exist_ok=True)
    write_csv(curves, home / "alpha.csv")
    text = as_markdown(curves)
    (home / "alpha.md").write_text(text, "utf-8")
    plot_trade_off(curves, home / "plots" / "alpha.png")
    tracker = open_run(replace(config, name=f"dual {config.name}"), home, tags)
    for curve in curves:
        for point in curve.points:
            values = {k.replace("test/", curve.prefix): v for k, v in point.shares.items()}
            step = round(1000 * point.alpha)
            tracker.handle({"kind": "metrics", "step": step, "values": values})
    tracker.upload(home, ["alpha.csv", "alpha.md", "plots"])
    if not tracker.close("finished"):
        follower.say("warning: MLflow does not have everything yet; the same command sends it")
    follower.say(text)
    follower.say(f"run {tracker.run_id}; table and plot in {home}")
    follower.say(f"see it with: {tracker.ui_hint()}")


if __name__ == "__main__":
    sys.exit(main(run))
