"""Standard accuracy: no attack."""

from dataclasses import dataclass

from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.attacked import Attacked, is_correct


@dataclass(frozen=True, kw_only=True)
class Clean:
    """SA: accuracy on the images as they are."""

    attack: PGD = PGD()

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        return Attacked(is_correct(model, x_BCHW, y_B), x_BCHW)
