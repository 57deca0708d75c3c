"""Every measure by name. A new one is a file here and a line below."""

from pipeline.measures.attacked import Attacked, Measure
from pipeline.measures.clean import Clean
from pipeline.measures.components import ExpertAttack, RouterAttack
from pipeline.measures.forced_route import ForcedRoute
from pipeline.measures.settings import Evaluation
from pipeline.measures.white_box import WhiteBox, WhiteBoxMargin

MEASURES: dict[str, type[Measure]] = {
    "sa": Clean,
    "ra_pgd": WhiteBox,
    "ra_pgd_margin": WhiteBoxMargin,
    "ra_forced": ForcedRoute,
    "ra_router": RouterAttack,
    "ra_expert": ExpertAttack,
}

__all__ = ["MEASURES", "Attacked", "Evaluation", "Measure"]
