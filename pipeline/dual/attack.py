"""Two trained models as the halves of dual ones, attacked at each weight of the robust half."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moe.backbones.dual import DualNetworks
from moe.dual_model import Dual, Mix
from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline import checkpoint
from pipeline.algorithms.standard import Standard
from pipeline.cli.console import Follower
from pipeline.config import Config
from pipeline.config.overrides import name_of
from pipeline.context import best_device
from pipeline.data.splits import Images
from pipeline.distributed.sharded_evaluation import evaluate_model
from pipeline.dual.alpha_curve import Point
from pipeline.evaluation.evaluator import Findings
from pipeline.evaluation.find_model import find, origin
from pipeline.evaluation.outcome_cache import digest
from pipeline.evaluation.plan import Plan, open_outcome_cache, plan_jobs
from pipeline.measures import Transfer
from pipeline.tracking import EVALUATED


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
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlphaSweep:
    """What is asked of each pair: the weights, what is mixed, and the attacks."""

    alphas: tuple[float, ...]
    mix: Mix
    plan: Plan
    transfer: bool = True


def read_half(name: str, where: Config) -> Half:
    """Load the model that a name stands for."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, tags = find(name, where, Path(scratch))
        model, config = checkpoint.load_model(folder), checkpoint.load_config(folder)
        names = tuple(checkpoint.data_of(folder).get("class_names", ()))
        return Half(tags[EVALUATED], model, config, origin(config, folder), names)


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
        Half(
            *(both.name, model.standard, standard),
            *(digest(both.identity, "standard"), both.class_names),
        ),
        Half(
            *(both.name, model.robust, robust),
            *(digest(both.identity, "robust"), both.class_names),
        ),
    )


def attacked(
    standard: Half,
    robust: Half,
    sweep: AlphaSweep,
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
    sweep: AlphaSweep,
    test: Images,
    follower: Follower,
) -> Findings:
    """Make the attacks of a plan on one model; of a dual one, those by either half too."""
    jobs = plan_jobs(config, test, sweep.plan)
    if sweep.transfer and isinstance(model, Dual):
        jobs["main"] = replace(
            jobs["main"], measures={**jobs["main"].measures, **transfers(model, config)}
        )
    store = open_outcome_cache(config, identity, test) if sweep.plan.reuse else None
    return evaluate_model(config, model, sweep.plan, jobs, store, follower)


def transfers(model: Dual, config: Config) -> dict[str, Transfer]:
    """Make images on either half alone, judged on the mixture: a half may hide the other's."""
    attack, device = config.evaluation.attack(config.evaluation.steps), best_device()
    return {
        f"ra_transfer_{name}": Transfer(source=fold(half.to(device)), attack=attack, origin=name)
        for name, half in (("standard", model.standard), ("robust", model.robust))
    }
