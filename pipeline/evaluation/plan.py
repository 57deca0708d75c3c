"""Plan of an evaluation: tier, attacks, images, checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

from moe.network import Network
from pipeline.attacks import ATTACKS
from pipeline.attacks.pgd import PGD
from pipeline.config import Config
from pipeline.config.overrides import parse
from pipeline.context import best_device
from pipeline.data.splits import Images
from pipeline.evaluation.evaluator import Job, cascaded, main_job, side_jobs
from pipeline.evaluation.find_model import TransferSource
from pipeline.evaluation.outcome_cache import (
    OUTCOMES_VERSION,
    OutcomeCache,
    digest,
    digest_of_images,
)
from pipeline.measures import MEASURES, Transfer
from pipeline.measures.sanity.probe_attacks import CURVE_STEPS
from pipeline.measures.tiers import TIERS, Tier, measures_of
from pipeline.storage.sync import storage_root

PREFIXES = ("evaluation.", "dataset.path", "dataset.test_images")


WHERE = ("experiment", "storage", "tracking_uri", "workers")


OPTIONS = (
    *("tier", "measure", "attack", "checks", "corruptions", "cascade", "reuse", "batch"),
    "substitute",
)


@dataclass(frozen=True)
class Plan:
    """What one evaluation does.

    Attributes:
        name, tier: The tier, with its measures replaced by those of the command line.
        checks, corruptions, cascade, reuse, batch: As in the usage.
        transfer: The model of another run, None for none.
        substitute: A network that was trained on the model's answers, None for none.
        workers: Processes on Ray; None: one for each GPU or core, with 64 images each at least.
        attack: Name of the attack that takes the place of PGD in the measures.
    """

    name: str
    tier: Tier
    checks: bool = True
    corruptions: bool = False
    cascade: bool = False
    reuse: bool = True
    batch: int = 256
    transfer: TransferSource | None = None
    substitute: Network | None = None
    attack: str = "pgd"
    workers: int | None = None


def read_plan(options: Mapping[str, str]) -> Plan:
    """Read the options that are no settings of a config."""
    name = parse("tier", options.get("tier", "standard"), str)
    if name not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {name!r}")
    tier, asked = TIERS[name], "measure" in options
    if asked:
        names = tuple(whole_name(name) for name in options["measure"].split(","))
        if unknown := [name for name in names if name not in MEASURES]:
            raise ValueError(f"measure must be of {', '.join(MEASURES)}, got {unknown[0]!r}")
        tier = replace(tier, measures=names, substitute=False)
    needs = {name: getattr(MEASURES[name], "package", "") for name in tier.measures}
    lacking = [name for name, package in needs.items() if package and not find_spec(package)]
    if lacking:
        if asked or name == "full":
            first = f"{lacking[0]} needs the package {needs[lacking[0]]}"
            raise ValueError(f"{first}: pip install 'robust-moe[eval]'")
        tier = replace(tier, measures=tuple(n for n in tier.measures if n not in lacking))
    wanted = parse("substitute", options.get("substitute", tier.substitute), bool)
    tier = replace(tier, substitute=wanted)
    batch = parse("batch", options.get("batch", 256), int)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    attack = options.get("attack", "pgd")
    if attack not in (kinds := pgd_kinds()):
        raise ValueError(f"attack must be of {', '.join(kinds)}, got {attack!r}")
    return Plan(
        name,
        tier,
        attack=attack,
        checks=parse("checks", options.get("checks", not asked), bool),
        corruptions=parse("corruptions", options.get("corruptions", False), bool),
        cascade=parse("cascade", options.get("cascade", False), bool),
        reuse=parse("reuse", options.get("reuse", True), bool),
        batch=batch,
    )


def whole_name(name: str) -> str:
    """Write a measure's name in full: ``pgd`` is ``ra_pgd``."""
    return name if name in MEASURES or f"ra_{name}" not in MEASURES else f"ra_{name}"


def pgd_kinds() -> dict[str, type[PGD]]:
    """Name the attacks that can take the place of PGD: those that differ in their steps alone."""
    return {name: kind for name, kind in ATTACKS.items() if issubclass(kind, PGD)}


def plan_jobs(config: Config, test: Images, plan: Plan) -> dict[str, Job]:
    """Choose images and attacks: those of the table under ``main``, and those of the checks."""
    experts = config.backbone.num_experts
    kind = pgd_kinds()[plan.attack]
    measures = measures_of(plan.tier.measures, config.evaluation, num_experts=experts, kind=kind)
    if kind is not PGD:  # a number of another attack gets a name of its own
        measures = {name.replace("pgd", plan.attack): made for name, made in measures.items()}
    if plan.transfer is not None:
        measures["ra_transfer"] = Transfer(
            source=plan.transfer.model,
            attack=config.evaluation.attack(config.evaluation.steps),
            origin=plan.transfer.origin,
        )
    if plan.substitute is not None:
        attack = config.evaluation.attack(config.evaluation.steps)
        measures["ra_substitute"] = Transfer(source=plan.substitute, attack=attack)
    if not measures:
        names = ", ".join(measures_of(MEASURES, config.evaluation, num_experts=experts))
        raise ValueError(f"measure must be of {names} for a dense net, got others")
    job = main_job(test, plan.tier, measures)
    jobs = {"main": cascaded(job) if plan.cascade else job}
    if plan.checks:
        steps = min(config.evaluation.steps, CURVE_STEPS)
        jobs |= side_jobs(config, job, plan.tier, curve_steps=steps)
    return jobs


def open_outcome_cache(config: Config, network: str, test: Images) -> OutcomeCache:
    """Find the outcomes of a network under the run folders."""
    place = (str(config.seed), digest_of_images(test), OUTCOMES_VERSION, best_device().type)
    home = storage_root(config.storage) / config.experiment / "outcomes"
    return OutcomeCache(home, network, digest(*place))
