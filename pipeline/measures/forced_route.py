"""An attack that drives each image to the expert that fails on it.

Hard top-1 routing hides the gradient of every expert that was not chosen; an attacker who aims at
one expert at a time, and pulls the router there, does not depend on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.losses import margin_per_image
from pipeline.measures.attacked import Attacked, break_images
from pipeline.measures.clean import Clean


@dataclass(frozen=True, kw_only=True)
class ForcedRoute:
    """RA-forced: for each expert e, PGD on ``margin of e - weight * max_j relu(r_j - r_e)``.

    The penalty is the gap that keeps the router from e (zero once it is there, and without a
    gradient then). Success is judged on the deployed model; an image stands if it stands against
    every e. With ``per_layer`` routers e is the expert of every layer.

    Attributes:
        weight: Of the gap, in logits of the classifier per logit of the router.
    """

    attack: PGD = PGD(steps=50)
    weight: float = 1.0

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = Clean()(model, x_BCHW, y_B, noise)
        with torch.no_grad():
            clean = model(x_BCHW)
        for expert in range(clean.router.shape[-1]):
            route = torch.full_like(clean.route, expert)

            def objective(x: Tensor, index: Tensor, e: int = expert, to: Tensor = route) -> Tensor:
                scores = model.router_scores(x)
                gap_B = (scores.amax(-1) - scores[..., e]).reshape(len(x), -1).sum(1)
                return margin_per_image(model.along(x, to[index]), y_B[index]) - self.weight * gap_B

            outcome = break_images(self.attack, model, objective, outcome, x_BCHW, y_B, noise)
        return outcome
