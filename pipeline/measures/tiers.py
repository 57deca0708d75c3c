"""Which attacks an evaluation makes, and on how many images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.attacks.pgd import PGD
from pipeline.measures import END_OF_RUN, MEASURES, Measure
from pipeline.measures.threat import Evaluation

NAMES = {"ra_pgd": "ra_pgd{}", "ra_pgd_margin": "ra_pgd{}_margin"}
TWICE = ("ra_apgd", "ra_apgd_dlr", "ra_apgd_t", "ra_forced_apgd", "ra_surrogate_apgd")
"""APGD takes twice the steps of PGD: 100 where the threat has 50, as in AutoAttack."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How thorough an evaluation is.

    Attributes:
        measures: By their names in the registry.
        images: Test images at most; None: all.
        steps: Of PGD, unless the command line says otherwise; None: those of the threat.
        curve: Images of the accuracy over eps.
        probed: Images of the other sanity checks.
        planted: Images of the binarization test, which takes them one by one.
        deep: Whether convergence is checked, with four times the steps.
        substitute: Whether a network is trained on the model's answers, to attack from.
    """

    measures: tuple[str, ...]
    images: int | None
    steps: int | None = None
    curve: int = 500
    probed: int = 128
    planted: int = 16
    deep: bool = True
    substitute: bool = False


TIERS = {
    "smoke": Tier(
        measures=("sa", "ra_pgd", "ra_surrogate", "ra_forced", "ra_noise"),
        images=500,
        steps=20,
        curve=64,
        probed=64,
        planted=0,
        deep=False,
    ),
    "standard": Tier(
        measures=(
            *("sa", "ra_pgd", "ra_pgd_margin", "ra_apgd", "ra_apgd_t"),
            *("ra_forced", "ra_forced_sweep", "ra_router", "ra_grid", "ra_hidden"),
            *("ra_queries", "ra_square", "ra_floor"),
        ),
        images=1000,
    ),
    "full": Tier(
        measures=(
            *("sa", "ra_pgd", "ra_pgd_margin", "ra_apgd", "ra_apgd_t"),
            *("ra_forced", "ra_forced_apgd", "ra_router", "ra_expert", "ra_adaptive"),
            *("ra_surrogate_apgd", "ra_grid", "ra_hidden", "ra_queries", "ra_gate_queries"),
            *("ra_aa", "ra_aa_surrogate", "ra_square", "ra_noise"),
            *("ra_each", "ra_floor"),
        ),
        images=None,
        probed=512,
        planted=64,
        substitute=True,
    ),
}
END = Tier(measures=END_OF_RUN, images=None, probed=64, planted=0, deep=False)
"""The end of a training run."""


def measures_of(
    names: Iterable[str], evaluation: Evaluation, *, num_experts: int, kind: type[PGD] = PGD
) -> dict[str, Measure]:
    """Make measures of the registry, by the name of their metric.

    Those that attack a route are left out for a dense net; ``ra_each`` becomes one for each expert.

    Args:
        kind: The attack that takes the place of PGD, with the threat's radius, norm, steps and
            restarts, and the rest by its own defaults.
    """
    made: dict[str, Measure] = {}
    for name in names:
        if num_experts == 1 and getattr(MEASURES[name], "routed", False):
            continue
        attack = evaluation.attack(evaluation.steps * (2 if name in TWICE else 1), kind)
        if name == "ra_each":
            for expert in range(num_experts):
                made[f"ra_each_{expert}"] = MEASURES[name](attack=attack, expert=expert)  # type: ignore[call-arg]
        else:
            metric = NAMES.get(name, name).format(evaluation.steps)
            made[metric] = MEASURES[name](attack=attack)
    return made
