"""Query attack on gates without a gradient: the route by queries, the expert by gradient.

Shapes: B images, A images still standing, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw, uphill
from pipeline.attacks.random_search import RandomSearch
from pipeline.measures.base import Attacked, is_correct, slope_of, untouched
from pipeline.measures.forced_route import targeted_routes
from pipeline.optimization.losses import margin_per_image


@dataclass(frozen=True, kw_only=True)
class GateQueries:
    """RA where each route is reached by queries of the router, its expert attacked by gradient.

    Square Attack on the lead of the route's experts over all others, then PGD on the margin of the
    network along that route. Each step is followed by a look at the deployed model; the gradient of
    the router, which the route's network does not have, is estimated by simultaneous perturbation
    (SPSA, Uesato et al., ICML 2018, arXiv:1802.05666) and outweighs the margin's while the image is
    not on the route.

    Attributes:
        queries: Of the router for each image and route, by Square Attack.
        samples: Pairs of queries for one estimate of the router's gradient.
        width: Of a perturbation, as a part of the radius.

    Raises:
        ValueError: A number of queries or samples is below 1, or the width is not above 0.
    """

    title: ClassVar[str] = "RA, routes reached by queries"
    cost: ClassVar[float] = 8.0
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)
    queries: int = 50
    samples: int = 4
    width: float = 0.5

    def __post_init__(self) -> None:
        if min(self.queries, self.samples) < 1:
            raise ValueError(f"queries and samples must be at least 1, got {self}")
        if not self.width > 0:
            raise ValueError(f"width must be above 0, got {self.width}")

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        if model.num_experts == 1:
            return outcome
        correct_B, x_adv = outcome.correct_B.clone(), outcome.x_adv.clone()
        search = RandomSearch(eps=self.attack.eps, norm=self.attack.norm, queries=self.queries)
        for route in targeted_routes(model, x_BCHW):
            lead = route_lead(model, route)
            now = search(lead, x_BCHW, noise)
            for step in range(self.attack.steps + 1):
                fell_B = correct_B & ~is_correct(model, now, y_B)
                x_adv[fell_B], correct_B = now[fell_B], correct_B & ~fell_B
                if step == self.attack.steps or not bool(correct_B.any()):
                    break
                now = self._step(model, route, lead, now, x_BCHW, y_B, noise)
        return Attacked(correct_B, x_adv)

    def _step(
        self,
        model: Network,
        route: Tensor,
        lead: Callable[[Tensor], Tensor],
        now: Tensor,
        x_BCHW: Tensor,
        y_B: Tensor,
        noise: Draw,
    ) -> Tensor:
        """Climb the expert's margin where the route is reached, the route's lead elsewhere."""
        by_margin = slope_of(lambda x: margin_per_image(model.along(x, route), y_B), now)
        by_route = self._estimated(lead, now, noise)
        there_B111 = (lead(now) > 0).view(-1, 1, 1, 1)
        attack = self.attack
        way = uphill(torch.where(there_B111, by_margin, by_route), attack.norm)
        stepped = attack.project(now + attack.step_size * way, x_BCHW)
        lost_B111 = there_B111 & (lead(stepped) <= 0).view(-1, 1, 1, 1)
        back = uphill(by_margin + by_route, attack.norm)
        return torch.where(
            lost_B111, attack.project(now + attack.step_size * back, x_BCHW), stepped
        )

    def _estimated(self, lead: Callable[[Tensor], Tensor], now: Tensor, noise: Draw) -> Tensor:
        """Estimate the gradient of a height from differences along random signs."""
        size, found = self.width * self.attack.eps, torch.zeros_like(now)
        if self.attack.norm == "l2":
            size /= now[0].numel() ** 0.5
        for _ in range(self.samples):
            signs = torch.where(noise.uniform(now) < 0, -1.0, 1.0)
            rise_B = lead(now + size * signs) - lead(now - size * signs)
            found += rise_B.view(-1, 1, 1, 1) * signs / (2 * size * self.samples)
        return found


def route_lead(model: Network, route: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the lead of a route's experts over the best others, least over the decisions: (B,)."""
    route_BL1 = route.reshape(len(route), -1, 1)

    def lead(x: Tensor) -> Tensor:
        with torch.no_grad():
            scores = model.router_scores(x)
        scores_BLE = scores.reshape(len(x), -1, scores.shape[-1])
        others_BL = scores_BLE.scatter(2, route_BL1, -torch.inf).amax(2)
        return (scores_BLE.gather(2, route_BL1).squeeze(2) - others_BL).amin(1)

    return lead
