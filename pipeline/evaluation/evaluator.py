"""A model examined: which images face which attacks, and what the outcomes add up to.

Shapes: N images of a split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.config import Config
from pipeline.config.overrides import name_of
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images, even_subset
from pipeline.measures import Evaluation, Measure
from pipeline.measures.base import role_of
from pipeline.measures.outcomes import counts
from pipeline.measures.routing_change import expert_overlap, flip_rates
from pipeline.measures.runner import Verdicts, summarize
from pipeline.measures.sanity.checks import Evidence
from pipeline.measures.sanity.leaderboard import reference
from pipeline.measures.sanity.probe_attacks import Planted, contrasts, facts_around, over_eps
from pipeline.measures.sanity.verdict import Verdict, decide
from pipeline.measures.tiers import Tier

FACT_IMAGES = 64
SUBSET = 0  # seed of all subsets: models are compared on the same images


@dataclass(frozen=True)
class Job:
    """Images, their numbers in the whole test split, and the attacks that they face."""

    images: Images
    ids_N: Tensor
    measures: Mapping[str, Measure]
    cascade: bool = False

    def few(self, count: int, measures: Mapping[str, Measure]) -> Job:
        """Make other attacks on some of the images, as even over the classes as they are."""
        rows = some_rows(self.images, count)
        return Job(self.images.pick(rows), self.ids_N[rows], measures)


@dataclass(frozen=True)
class Findings:
    """All that an evaluation found.

    Attributes:
        main: Outcomes of the measures; ``job`` says on which images.
        curve: (eps, images that stand, images), of the plain attack.
        metrics: What MLflow gets.
        evaluation: The threat as it was.
        notes: What else a reader must know of the conditions, in sentences.
    """

    tier: str
    job: Job
    main: Verdicts
    curve: tuple[tuple[float, int, int], ...]
    verdict: Verdict
    metrics: Mapping[str, float]
    evaluation: Evaluation
    extra: Mapping[str, Verdicts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def main_job(test: Images, tier: Tier, measures: Mapping[str, Measure]) -> Job:
    """Take the images of a tier, the same for every seed; a smaller tier has some of them."""
    rows = some_rows(test, len(test) if tier.images is None else tier.images)
    return Job(test.pick(rows), rows, measures)


def some_rows(images: Images, count: int) -> Tensor:
    """Choose images, as even over the classes as all are, by the images alone."""
    if count >= len(images):
        return torch.arange(len(images))
    return even_subset(images.labels_N, count, SUBSET)


def side_jobs(config: Config, main: Job, tier: Tier, *, curve_steps: int) -> dict[str, Job]:
    """Choose the attacks that only the checks and the curve need."""
    threat, routed = config.evaluation, config.backbone.num_experts > 1
    pixels = main.images.pixels_NCHW[0].numel()
    found = {
        "curve": (tier.curve, over_eps(threat, curve_steps)),
        "contrasts": (tier.probed, contrasts(threat, pixels, deep=tier.deep, routed=routed)),
    }
    if tier.planted:
        attack = threat.attack(threat.steps)
        found["planted"] = (tier.planted, {"planted": Planted(attack=attack)})
    return {name: main.few(count, attacks) for name, (count, attacks) in found.items()}


def examine(
    config: Config,
    model: Network,
    tier: str,
    job: Job,
    main: Verdicts,
    sides: Mapping[str, Verdicts],
    device: torch.device,
) -> Findings:
    """Weigh the outcomes: metrics, the curve, and the verdict."""
    threat, experts = config.evaluation, config.backbone.num_experts
    metrics = summarize(main, experts, "test") | route_metrics(main, experts)
    found: dict[str, Tensor] = {}
    for name in ("curve", "contrasts"):
        found |= sides[name].correct if name in sides else {}
    probed = sides["contrasts"].correct["noise"] if "contrasts" in sides else None
    planted = sides["planted"].correct["planted"] if "planted" in sides else None
    few = to_float(job.images.pixels_NCHW[:FACT_IMAGES].to(device))
    labels_B = job.images.labels_N[:FACT_IMAGES].to(device)
    seen = facts_around(fold(model.to(device)), few, labels_B, threat.attack(threat.steps))
    evidence = Evidence(
        threat=threat,
        num_classes=config.dataset.num_classes,
        correct=main.whole,
        worst_N=main.worst,
        outcomes=main.outcomes,
        probes=found,
        probed_M=None if probed is None else some_rows(job.images, len(probed)),
        planted=planted,
        roles={name: role_of(measure) for name, measure in job.measures.items()},
        facts=seen,
        reference=reference(
            name_of("dataset", config.dataset),
            name_of("backbone", config.backbone),
            norm=threat.norm,
            eps=threat.eps,
        ),
        tier=tier,
    )
    verdict = decide(evidence)
    metrics |= {f"check/{c.name}": c.value for c in verdict.checks if c.value is not None}
    return Findings(tier, job, main, curve_of(sides), verdict, metrics, threat, dict(sides))


def route_metrics(main: Verdicts, num_experts: int) -> dict[str, float]:
    """Say how the white-box attack moves the routes: of broken and surviving images, and overlap.

    The overlap is the mean intersection over union of the experts before and after.
    """
    aimed = next((name for name in main.correct if counts(name)), None)
    if num_experts == 1 or aimed is None:
        return {}
    rates = flip_rates(main.route, main.route_attacked, main.correct[aimed])
    overlap_L = expert_overlap(main.route, main.route_attacked, num_experts)
    found = {f"route/flip_rate_{group}": rate for group, rate in rates.items() if group != "all"}
    return found | {"route/overlap": float(overlap_L.mean())}


def curve_of(sides: Mapping[str, Verdicts]) -> tuple[tuple[float, int, int], ...]:
    """Read the accuracy over eps off the outcomes: (eps, images that stand, images)."""
    if "curve" not in sides:
        return ()
    correct = sides["curve"].correct
    return tuple(
        (float(name.split()[1]), int(hits.sum()), len(hits))
        for name, hits in correct.items()
        if name != "sa"
    )


def waterfall(main: Verdicts) -> list[tuple[str, int, int]]:
    """Count, attack by attack, the images that it is the first to break, and those left.

    The first row is what is misclassified without an attack. The sum of the broken and what is
    left at the end are all images; the last row's rest is ``ra_worst``.
    """
    names = [name for name in main.correct if counts(name)]
    if "sa" in main.correct:
        names.insert(0, "sa")
    rows = []
    left = torch.ones_like(main.correct[names[0]]) if names else torch.empty(0)
    for name in names:
        broken = left & ~main.correct[name]
        left = left & ~broken
        rows.append((name, int(broken.sum()), int(left.sum())))
    return rows


def cascaded(job: Job) -> Job:
    """Keep what the worst case needs, each attack on what the ones before left standing."""
    wanted = {k: m for k, m in job.measures.items() if k == "sa" or counts(k)}
    return replace(job, measures=wanted, cascade=True)
