"""Black-box attack without a package: random search on the margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.attacks.random_search import RandomSearch
from pipeline.measures.base import Attacked, Role, is_correct
from pipeline.optimization.losses import margin_per_image


@dataclass(frozen=True, kw_only=True)
class Queries:
    """RA under random search on the margin: a black box that is always at hand.

    Attributes:
        queries: Evaluations of the model per image.
    """

    title: ClassVar[str] = "RA, random search of 200 queries (black box)"
    cost: ClassVar[float] = 2.0
    role: ClassVar[Role] = "black_box"
    attack: PGD = PGD(steps=50)
    queries: int = 200

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        search = RandomSearch(eps=self.attack.eps, norm=self.attack.norm, queries=self.queries)
        found = search(lambda x: margin_per_image(model(x).logits, y_B), x_BCHW, noise)
        return Attacked(is_correct(model, x_BCHW, y_B) & is_correct(model, found, y_B), found)
