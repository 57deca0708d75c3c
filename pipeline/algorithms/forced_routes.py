"""Training against an attacker who sets the route: random experts for a share of the images.

Shapes: B images, E experts, CHW channels and sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.network import Network
from pipeline.algorithms.attack_objectives import Aim
from pipeline.attacks import Objective
from pipeline.optimization.losses import cross_entropy_per_image, kl, kl_per_image
from pipeline.optimization.state import Terms, TrainState


@dataclass(frozen=True)
class DrawnRoutes:
    """One update's experts for attacked images whose route the attacker has set.

    Attributes:
        forced_B: Which images are meant.
        expert_B: Their experts, drawn evenly; of every layer, where each routes for itself.
    """

    forced_B: Tensor
    expert_B: Tensor

    def of(self, own: Tensor) -> Tensor:
        """Replace the router's choice, (B,) or (B, L), for the forced images."""
        shape = (-1, *[1] * (own.dim() - 1))
        return torch.where(self.forced_B.view(shape), self.expert_B.view(shape), own)

    def aim(self, kind: str, y_B: Tensor) -> Aim:
        """Make AdvMoE's aim along these routes: ``d(x') + KL(r(x) || r(x'))``, (B,).

        ``d`` is as in ``attack_objectives.joint``. The router's term is left out for forced
        images: their route is set already.
        """

        def aim(model: Network, x_BCHW: Tensor) -> Objective:
            with torch.no_grad():
                clean = model(x_BCHW)

            def objective(x_adv: Tensor) -> Tensor:
                scores = model.router_scores(x_adv)
                logits_BK = model.along(x_adv, self.of(scores.detach().argmax(-1)))
                flips_B = kl_per_image(clean.router, scores).masked_fill(self.forced_B, 0.0)
                if kind == "ce":
                    return cross_entropy_per_image(logits_BK, y_B) + flips_B
                return kl_per_image(clean.logits, logits_BK) + flips_B

            return objective

        return aim

    def terms(self, state: TrainState, x_BCHW: Tensor, x_adv: Tensor, y_B: Tensor) -> Terms:
        """``CE(f(x), y)`` and ``KL(f(x) || f_e(x'))``, e the drawn expert of the forced images."""

        def terms() -> dict[str, Tensor]:
            clean = state.model(x_BCHW)
            with torch.no_grad():
                scores = state.model.router_scores(x_adv)
            state.watch("router scores", scores.abs().amax())
            moved = state.model.along(x_adv, self.of(scores.argmax(-1)))
            natural = state.cross_entropy(clean.logits, y_B)
            return {"natural": natural, "robust": kl(clean.logits, moved)}

        return terms


def draw_routes(state: TrainState, x_BCHW: Tensor, share: float) -> DrawnRoutes:
    """Draw which images are forced, each with probability ``share``, and to which expert."""
    blank_B = x_BCHW.new_zeros(len(x_BCHW), dtype=torch.float32)
    forced_B = (state.noise.uniform(blank_B) + 1) / 2 < share
    position_B = (state.noise.uniform(blank_B) + 1) / 2 * state.model.num_experts
    return DrawnRoutes(forced_B, position_B.long().clamp(max=state.model.num_experts - 1))
