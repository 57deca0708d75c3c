"""Every training algorithm by name. A new one is a file here and a line below."""

from typing import Protocol

from torch import Tensor

from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.gaussian import Gaussian
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.moe_at import MoEAT
from pipeline.algorithms.pgd_training import PGDTraining
from pipeline.algorithms.rt_er import RTER
from pipeline.algorithms.sparse import Sparse
from pipeline.algorithms.standard import Standard
from pipeline.algorithms.trades import Trades
from pipeline.algorithms.upcycled_adv_moe import UpcycledAdvMoE
from pipeline.optimization.state import TrainState


class Algorithm(Protocol):
    """Settings are fields, one update is ``step``; it returns losses in nats per image.

    Labels are classes (B,), or, of mixed images, the share of each class (B, K). Losses of labels
    come from ``state.cross_entropy`` and updates from ``state.minimize``, which know the recipe.
    One that trains several networks in turn also offers what ``Staged`` lists; one that steps
    other groups than experts and router offers a ``partition`` (``pipeline.optimization.state``);
    one that does not train against an attack names ``selects = "val/sa"``, see ``selects``.
    """

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]: ...


ALGORITHMS: dict[str, type[Algorithm]] = {
    "standard": Standard,
    "pgd_training": PGDTraining,
    "trades": Trades,
    "moe_at": MoEAT,
    "adv_moe": AdvMoE,
    "upcycled_adv_moe": UpcycledAdvMoE,
    "sparse": Sparse,
    "rt_er": RTER,
    "jtdmoe": JTDMoE,
    "gaussian": Gaussian,
}


def selects(algorithm: Algorithm) -> str:
    """Name the metric whose highest value on the validation split selects the epoch to deploy.

    Robust accuracy, unless the algorithm knows of no attack: without one it falls from some early
    epoch on, and would select a net that has hardly learned.
    """
    return str(getattr(algorithm, "selects", "val/ra"))
