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

# What a training run ends with: the others cost up to a hundred times as much.
END_OF_RUN = ("sa", "ra_pgd", "ra_pgd_margin", "ra_forced", "ra_router", "ra_expert")
# A dense net has no route to attack: these say nothing new of it.
ROUTED = ("ra_forced", "ra_router", "ra_expert")
# These need the extra eval.
PACKAGED = ("ra_aa", "ra_square")

__all__ = ["END_OF_RUN", "MEASURES", "PACKAGED", "ROUTED", "Attacked", "Evaluation", "Measure"]
