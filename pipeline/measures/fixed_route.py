"""How robust the experts are, each for itself: floors under the mixture, no attacks on it.

Shapes: B images, E experts, CHW channels and sides.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks import Walker
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_by, untouched
from pipeline.optimization.losses import margin_per_image


def stand_along(
    model: Network,
    before: Attacked,
    x_BCHW: Tensor,
    y_B: Tensor,
    expert: int,
    attack: Walker,
    noise: Draw,
) -> Attacked:
    """Attack one expert as a classifier of its own: margin and judgement along its fixed route.

    With ``per_layer`` routers the expert is that of every layer.

    Args:
        before: Outcome so far; its broken images are left alone.
    """
    with torch.no_grad():
        route = torch.full_like(model(x_BCHW).route, expert)

    def stands(x: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            correct_A: Tensor = model.along(x, route[index]).argmax(1) == y_B[index]
        return correct_A

    def objective(x: Tensor, index: Tensor) -> Tensor:
        return margin_per_image(model.along(x, route[index]), y_B[index])

    every_B = torch.arange(len(y_B), device=y_B.device)
    here = before._replace(correct_B=before.correct_B & stands(x_BCHW, every_B))
    return break_by(stands, attack, objective, here, x_BCHW, noise)


def per_expert(model: Network, x_BCHW: Tensor, y_B: Tensor, attack: Walker, noise: Draw) -> Tensor:
    """Tell which images stand with each expert alone, bool (B, E)."""
    all_B = torch.ones_like(y_B, dtype=torch.bool)
    columns = [
        stand_along(model, Attacked(all_B, x_BCHW), x_BCHW, y_B, expert, attack, noise).correct_B
        for expert in range(model.num_experts)
    ]
    return torch.stack(columns, 1)


@dataclass(frozen=True, kw_only=True)
class OneExpert:
    """RA of one expert as a classifier of its own, whatever the router says.

    Attributes:
        expert: Its index, from 0.

    Raises:
        ValueError: The model has no such expert.
    """

    routed: ClassVar[bool] = True
    floor: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)
    expert: int = 0

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        if not 0 <= self.expert < model.num_experts:
            raise ValueError(f"expert must be in 0 to {model.num_experts - 1}, got {self.expert}")
        before = Attacked(torch.ones_like(y_B, dtype=torch.bool), x_BCHW)
        return stand_along(model, before, x_BCHW, y_B, self.expert, self.attack, noise)


@dataclass(frozen=True, kw_only=True)
class FreeChoice:
    """The floor: an image stands if it does with every expert, each attacked for itself.

    What an attacker reaches who sets the route at will. Whatever breaks a mixture with one route
    breaks the expert that it ends at, so no attack goes below this, up to the strength of
    ``attack``: the gap to ``ra_worst`` bounds what the attacks on the router can have missed. It is
    no attack on the deployed model and does not count into ``ra_worst``. With ``per_layer`` routers
    only the E routes that take one expert throughout are tried: a hint, and no floor.
    """

    title: ClassVar[str] = "floor: the attacker sets the route"
    routed: ClassVar[bool] = True
    floor: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        for expert in range(model.num_experts):
            outcome = stand_along(model, outcome, x_BCHW, y_B, expert, self.attack, noise)
        return outcome
