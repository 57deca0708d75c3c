"""RT-ER: adversarial training of a mixture that makes one more expert robust.

Shapes: B images, E experts, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.valid_fields import CheckedFields, NonNegative
from pipeline.algorithms.attack_objectives import Aim, error
from pipeline.attacks import Attack, Objective
from pipeline.attacks.pgd import PGD
from pipeline.optimization.losses import cross_entropy_per_image, kl
from pipeline.optimization.state import GROUPS, Terms, TrainState

Robustify = Literal["second", "all", "none"]
Part = Callable[[Network], Network]
"""Picks what trains out of the model: all of it, or a half."""


@dataclass(frozen=True, kw_only=True)
class RTER(CheckedFields):
    """``CE(F(x'), y) + beta / B sum_b KL(f_j(x) || f_j(x^j))`` (arXiv:2502.06832, section 4).

    x' raises the cross-entropy of the whole model, x^j that of expert j alone, where j is the
    expert that the router ranks second on the clean image: the one that an attack on the router
    is likeliest to bring in. Experts and router step together. An expert of a mixture in the layers
    is its pathway through the network; with ``per_layer`` routers j is the second of every layer.

    Attributes:
        beta: Weight of the second term; 6 in the paper, which sweeps 1, 3, 6, 9.
        robustify: Experts in that term: the ``second`` of each image (the paper), ``all`` (a sum
            over the experts, E attacks), or ``none``: adversarial training of the whole model.
        attack: How x' and x^j are found.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: NonNegative = 6.0
    robustify: Robustify = "second"
    attack: Attack = PGD()

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""
        terms = rt_er_terms(state, lambda m: m, x_BCHW, y_B, self.attack, self.robustify)
        return state.minimize(terms, {"robust": 1.0, "consistency": self.beta}, *GROUPS)


def rt_er_terms(
    state: TrainState,
    part: Part,
    x_BCHW: Tensor,
    y_B: Tensor,
    attack: Attack,
    robustify: Robustify,
) -> Terms:
    """Attack a part of the model and its experts; return the terms of RT-ER's loss on it."""
    whole = error(y_B)
    x_adv = state.perturb(attack, lambda frozen, x: whole(part(frozen), x), x_BCHW)
    moved = []
    for route in routes(part(fold(state.model)), x_BCHW, robustify):
        aim = expert_error(part, y_B, route)
        moved.append((route, state.perturb(attack, aim, x_BCHW)))

    def terms() -> dict[str, Tensor]:
        net = part(state.model)
        routed = net(x_adv)
        state.watch("router scores", routed.router.abs().amax())
        found = {"robust": state.cross_entropy(routed.logits, y_B)}
        consistency = [kl(net.along(x_BCHW, to), net.along(x_moved, to)) for to, x_moved in moved]
        return found | ({"consistency": torch.stack(consistency).sum()} if consistency else {})

    return terms


def routes(frozen: Network, x_BCHW: Tensor, robustify: Robustify) -> list[Tensor]:
    """Choose the experts to make robust: one route for each, (B,) or (B, L)."""
    if robustify == "none":
        return []
    with torch.no_grad():
        scores = frozen.router_scores(x_BCHW)
    if scores.shape[-1] < 2:
        raise ValueError("rt_er needs a second expert: num_experts must be at least 2, got 1")
    if robustify == "second":
        return [scores.topk(2, dim=-1).indices[..., 1]]
    return [torch.full(scores.shape[:-1], e, device=scores.device) for e in range(scores.shape[-1])]


def expert_error(part: Part, y_B: Tensor, route: Tensor) -> Aim:
    """Make the aim ``CE(f_j(x'), y)``, (B,), of each image's own expert j alone."""

    def aim(frozen: Network, x_BCHW: Tensor) -> Objective:
        return lambda x_adv: cross_entropy_per_image(part(frozen).along(x_adv, route), y_B)

    return aim
