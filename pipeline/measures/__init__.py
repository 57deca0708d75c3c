"""Every measure by name. A new one is a file here and a line below."""

from pipeline.measures.adaptive import Adaptive
from pipeline.measures.auto_attack import AutoAttack, AutoAttackSurrogate, Square
from pipeline.measures.base import Attacked, Measure
from pipeline.measures.fixed_route import FreeChoice, OneExpert
from pipeline.measures.forced_route import ForcedRoute, ForcedRouteAPGD, ForcedRouteSweep
from pipeline.measures.gate_queries import GateQueries
from pipeline.measures.gradient_attack import (
    AutoPGD,
    AutoPGDRatio,
    AutoPGDTargeted,
    Clean,
    WhiteBox,
    WhiteBoxMargin,
)
from pipeline.measures.hidden_gradients import HiddenGradients
from pipeline.measures.noise_and_transfer import RandomNoise, Transfer
from pipeline.measures.pixel_grid import OnGrid
from pipeline.measures.random_queries import Queries
from pipeline.measures.router_and_experts import ExpertAttack, RouterAttack
from pipeline.measures.small_steps import OtherRoutes, SmallSteps
from pipeline.measures.soft_gates import Surrogate, SurrogateAPGD
from pipeline.measures.threat import Evaluation

MEASURES: dict[str, type[Measure]] = {
    "sa": Clean,
    "ra_pgd": WhiteBox,
    "ra_pgd_margin": WhiteBoxMargin,
    "ra_forced": ForcedRoute,
    "ra_router": RouterAttack,
    "ra_expert": ExpertAttack,
    "ra_apgd": AutoPGD,
    "ra_apgd_dlr": AutoPGDRatio,
    "ra_apgd_t": AutoPGDTargeted,
    "ra_forced_sweep": ForcedRouteSweep,
    "ra_forced_apgd": ForcedRouteAPGD,
    "ra_surrogate": Surrogate,
    "ra_surrogate_apgd": SurrogateAPGD,
    "ra_adaptive": Adaptive,
    "ra_aa": AutoAttack,
    "ra_aa_surrogate": AutoAttackSurrogate,
    "ra_square": Square,
    "ra_grid": OnGrid,
    "ra_hidden": HiddenGradients,
    "ra_queries": Queries,
    "ra_gate_queries": GateQueries,
    "ra_noise": RandomNoise,
    "ra_vmoe": SmallSteps,
    "ra_other_routes": OtherRoutes,
    "ra_floor": FreeChoice,
    "ra_each": OneExpert,
}

# What a training run ends with: the others cost up to a hundred times as much.
END_OF_RUN = ("sa", "ra_pgd", "ra_pgd_margin", "ra_forced", "ra_router", "ra_expert")
FLOORS = tuple(name for name, kind in MEASURES.items() if getattr(kind, "floor", False))
"""Judged along a fixed route and not on the deployed model: they do not count into ra_worst."""
PACKAGED = tuple(name for name, kind in MEASURES.items() if getattr(kind, "package", ""))
"""These need the extra eval."""

__all__ = [
    "END_OF_RUN",
    "FLOORS",
    "MEASURES",
    "PACKAGED",
    "Attacked",
    "AutoAttack",
    "Evaluation",
    "Measure",
    "Transfer",
]
