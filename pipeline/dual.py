"""Mix two runs as a dual model: ``python -m pipeline.dual STANDARD ROBUST [key=value ...]``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.backbones.dual import DualNetworks
from moe.dual import Dual, Mix, check_mix
from moe.folding import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.algorithms.standard import Standard
from pipeline.command import fail, main, read_arguments
from pipeline.config import Config, flatten, name_of, override, parse
from pipeline.console import Follower
from pipeline.data.loading import Images
from pipeline.evaluate import (
    OPTIONS,
    PREFIXES,
    WHERE,
    Plan,
    open_ledger,
    plan_jobs,
    read_plan,
)
from pipeline.examine import Findings, examine
from pipeline.ledger import digest
from pipeline.lookup import find, origin
from pipeline.measures import END_OF_RUN, Transfer
from pipeline.plots import plot_trade_off
from pipeline.session import best_device
from pipeline.shards import shards
from pipeline.stores import storage_root
from pipeline.tracking import EVALUATED
from pipeline.tradeoff import Curve, Point, as_markdown, write_csv
from pipeline.train import open_run

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
  transfer=true|false        images made on either half alone, as an attack (default: true)
  measure=a,b,...            of those of pipeline.evaluate (default: {",".join(END_OF_RUN)})
  tier, checks, cascade, reuse, batch, workers, evaluation.*, dataset.path, dataset.test_images,
  experiment, storage, tracking_uri as in pipeline.evaluate
"""
OWN = ("alpha", "mix", "joint", "transfer")


@dataclass(frozen=True)
class Half:
    """A trained model, what it is called, the config it was trained by, and what names it.

    Attributes:
        identity: Hash of its weights and backbone.
    """

    name: str
    model: Network
    config: Config
    identity: str


@dataclass(frozen=True)
class Sweep:
    """What is asked of each pair: the weights, what is mixed, and the attacks."""

    alphas: tuple[float, ...]
    mix: Mix
    plan: Plan
    transfer: bool = True


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
    alphas = read_alphas(own.get("alpha", ALPHAS))
    names = list(given.names) if len(given.names) == 2 else []
    joint = own.get("joint") if names else given.names[0]
    if not names and "joint" in own:
        raise ValueError(f"joint={own['joint']} goes with a standard and a robust run, got one run")
    try:
        halves = [read_half(name, where) for name in names]
        both = read_half(joint, where) if joint else None
    except checkpoint.CheckpointError as error:
        return fail(str(error), 1)
    mix: Any = own.get("mix") or getattr(both and both.config.backbone, "mix", "probabilities")
    check_mix(0, mix)
    sweep = Sweep(alphas, mix, plan, parse("transfer", own.get("transfer", True), bool))
    return draw(halves, both, sweep, {"workers": 1, "batch_size": 2 * where.workers, **settings})


def read_alphas(text: str) -> tuple[float, ...]:
    """Read the weights, in ascending order."""
    alphas = sorted({parse("alpha", part, float) for part in text.split(",")})
    for alpha in alphas:
        check_mix(alpha, "logits")
    return tuple(alphas)


def read_half(name: str, where: Config) -> Half:
    """Load the model that a name stands for."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, tags = find(name, where, Path(scratch))
        model, config = checkpoint.load_model(folder), checkpoint.load_config(folder)
        return Half(tags[EVALUATED], model, config, origin(config, folder))


def draw(halves: Sequence[Half], both: Half | None, sweep: Sweep, changes: dict[str, Any]) -> int:
    """Attack every mixture of the pairs; write the table and the plot, and track them."""
    pairs = [("post hoc", halves[0], halves[1])] if halves else []
    if both is not None:
        standard, robust = split(both)
        pairs.append(("joint", standard, robust))
    base = pairs[0][2].config
    for _, *pair in pairs:
        for half in pair:
            check_same(half.config, base)
    config = override(base, changes)
    try:
        splits = config.dataset.load(config.seed)
    except ValueError as error:
        return fail(str(error), 1)
    follower, curves = Follower(), []
    for name, standard, robust in pairs:
        points = []
        for point in attacked(standard, robust, sweep, config, splits.test, follower):
            follower.say(f"{name}, alpha {point.alpha:g}: {point.headline}")
            points.append(point)
        own = both.config.backbone.alpha if both and name == "joint" else None  # type: ignore[attr-defined]
        curves.append(Curve(name, tuple(points), own))
    track(config, [half.name for half in halves], both, sweep, curves, follower)
    return 0


def check_same(config: Config, base: Config) -> None:
    """Refuse models of other images or classes than the robust one's."""
    for key, own, want in (
        ("dataset", name_of("dataset", config.dataset), name_of("dataset", base.dataset)),
        ("dataset.num_classes", config.dataset.num_classes, base.dataset.num_classes),
        ("dataset.image_size", config.dataset.image_size, base.dataset.image_size),
    ):
        if own != want:
            raise ValueError(f"{key} must be {want} for every model, got {own}: {config.name}")


def split(both: Half) -> tuple[Half, Half]:
    """Take a jointly trained model apart."""
    backbone, model = both.config.backbone, both.model
    if not isinstance(model, Dual) or not isinstance(backbone, DualNetworks):
        raise ValueError(
            f"joint must be a run with backbone=dual, got {name_of('backbone', backbone)!r}; "
            "two runs are put together by naming both"
        )
    plain = replace(both.config, algorithm=Standard())
    standard = replace(plain, backbone=backbone.standard)
    robust = replace(plain, backbone=backbone.robust)
    return (
        Half(both.name, model.standard, standard, digest(both.identity, "standard")),
        Half(both.name, model.robust, robust, digest(both.identity, "robust")),
    )


def attacked(
    standard: Half,
    robust: Half,
    sweep: Sweep,
    config: Config,
    test: Images,
    follower: Follower,
) -> Iterator[Point]:
    """Attack the mixture at each weight: the deployed one, through both halves."""
    for alpha in sweep.alphas:
        if alpha in (0, 1):
            half = robust if alpha else standard
            model, identity, backbone = half.model, half.identity, half.config.backbone
        else:
            parts = standard.model, robust.model
            model = Dual(*parts, alpha=alpha, mix=sweep.mix).eval()
            backbone = DualNetworks(
                standard=standard.config.backbone,
                robust=robust.config.backbone,
                alpha=alpha,
                mix=sweep.mix,
            )
            identity = digest(standard.identity, robust.identity, f"{alpha} {sweep.mix}")
        own = replace(config, backbone=backbone, algorithm=Standard())
        found = judge_one(own, model, identity, sweep, test, follower)
        yield Point(alpha, found.metrics, found.verdict.text, len(found.job.images))


def judge_one(
    config: Config,
    model: Network,
    identity: str,
    sweep: Sweep,
    test: Images,
    follower: Follower,
) -> Findings:
    """Make the attacks of a plan on one model; of a dual one, those by either half too."""
    jobs = plan_jobs(config, test, sweep.plan)
    if sweep.transfer and isinstance(model, Dual):
        jobs["main"] = replace(
            jobs["main"], measures={**jobs["main"].measures, **transfers(model, config)}
        )
    store = open_ledger(config, identity, test) if sweep.plan.reuse else None
    results = shards(config, model, jobs, store, sweep.plan.batch, follower)
    sides = {name: found for name, found in results.items() if name != "main"}
    main_found = results["main"]
    return examine(config, model, sweep.plan.name, jobs["main"], main_found, sides, best_device())


def transfers(model: Dual, config: Config) -> dict[str, Transfer]:
    """Make images on either half alone, judged on the mixture: a half may hide the other's."""
    attack, device = config.evaluation.attack(config.evaluation.steps), best_device()
    return {
        f"ra_transfer_{name}": Transfer(source=fold(half.to(device)), attack=attack, origin=name)
        for name, half in (("standard", model.standard), ("robust", model.robust))
    }


def track(
    config: Config,
    names: Sequence[str],
    both: Half | None,
    sweep: Sweep,
    curves: Sequence[Curve],
    follower: Follower,
) -> None:
    """Write table and plot, and a run in MLflow whose steps are thousandths of alpha."""
    tags = dict(zip(("dual_standard", "dual_robust"), names, strict=False))
    tags |= {"dual_joint": both.name} if both else {}
    tags |= {EVALUATED: " ".join(tags.values()), "mix": sweep.mix}
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
