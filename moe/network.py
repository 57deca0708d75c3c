"""A classifier made of a router and a body whose layers follow its route."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe.normalize import Normalize
from moe.routing import Route, Routed, Routing, at_least_float32

PIECE = 64  # images at most that run end to end at a time on a CPU: activations stay in cache


class Network(nn.Module):
    """Normalization, router and body of a dense or mixture classifier.

    Training runs layer by layer over the whole batch, which BatchNorm must see. In eval mode the
    router, and then each expert with its images, run end to end, in cache-sized pieces on a CPU.

    Args:
        body: Module ``(x_BCHW, routing) -> logits (B, K)``.
        router: Module from normalized images to scores (B, E); None for a dense net and where
            every layer routes for itself.
        num_experts: E, 1 for a dense net.
        num_layers: Layers that route for themselves, 0 where one route serves the whole network.

    Attributes:
        tokens: Decisions of each of these layers per image.
        gate_gradient: Whether gates carry the straight-through gradient to the router, which is
            what trains it. The deployed function is constant in its gates almost everywhere, so
            its true gradient is the one without; see ``moe.fold_batchnorm.fold``.
    """

    tokens = 1

    def __init__(
        self,
        body: nn.Module,
        router: nn.Module | None,
        *,
        normalize: Normalize,
        num_experts: int,
        num_layers: int = 0,
    ):
        super().__init__()
        self.normalize, self.router, self.body = normalize, router, body
        self.num_experts, self.num_layers = num_experts, num_layers
        self.gate_gradient = True

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Classify pixels in [0, 1]."""
        x_BCHW = self.normalize(x_BCHW)
        if self.num_layers:
            routing = Routing(gate_gradient=self.gate_gradient)
            logits_BK = self.body(x_BCHW, routing)
            return Routed(logits_BK, torch.stack(routing.scores, 1), torch.stack(routing.chosen, 1))
        scores_BE = self.scores(x_BCHW)
        route = Route.top1(scores_BE if self.gate_gradient else scores_BE.detach())
        return Routed(self._follow(x_BCHW, route), scores_BE, route.chosen_B)

    def along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Classify along a given route, (B,) or (B, L) as in ``Routed``; return logits (B, K).

        The router is left out: no gradient reaches the image through it.

        Raises:
            ValueError: The route has another shape, or names an expert that is not there.
        """
        self.check_route(x_BCHW, route)
        x_BCHW = self.normalize(x_BCHW)
        if self.num_layers:
            logits_BK: Tensor = self.body(x_BCHW, Routing(gate_gradient=False, fixed_BL=route))
            return logits_BK
        scores_BE = x_BCHW.new_zeros(len(x_BCHW), self.num_experts)
        return self._follow(x_BCHW, Route.fixed(route, scores_BE))

    def check_route(self, x_BCHW: Tensor, route: Tensor) -> None:
        """Refuse a route that these images cannot take.

        Raises:
            ValueError: The route has another shape, or names an expert that is not there.
        """
        want = (len(x_BCHW), self.num_layers) if self.num_layers else (len(x_BCHW),)
        if route.shape != want:
            raise ValueError(f"route has shape {tuple(route.shape)}, want {want}")
        for expert in route.aminmax() if route.numel() else ():
            if not 0 <= expert < self.num_experts:
                last = self.num_experts - 1
                raise ValueError(f"route names expert {int(expert)}, valid are 0 to {last}")

    def decisions(self, route: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Say who decided what: for each router its experts' indices, and how many there are."""
        return {"router": (route, self.num_experts)} if self.num_experts > 1 else {}

    def held(self, x_BCHW: Tensor, scores: Tensor) -> Tensor:
        """Classify (B, K) with the routing of other images, whose router scores are given."""
        return self.along(x_BCHW, scores.argmax(-1))

    def routing_scores(self, x_BCHW: Tensor) -> Tensor:
        """Return the scores that ``held`` routes by: those of ``Routed``."""
        scores: Tensor = self(x_BCHW).router
        return scores

    def router_scores(self, x_BCHW: Tensor) -> Tensor:
        """Score the experts on pixels in [0, 1], without the body where the router needs none."""
        if self.num_layers:
            layers_BLE: Tensor = self(x_BCHW).router
            return layers_BLE
        return self.scores(self.normalize(x_BCHW))

    def scores_along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Score the experts as ``router_scores`` does, with every layer's route held.

        So an earlier layer's change of route makes no jump in the scores of a later one.

        Args:
            route: (B,) or (B, L), as in ``Routed``.

        Raises:
            ValueError: The route has another shape, or names an expert that is not there.
        """
        if not self.num_layers:
            return self.router_scores(x_BCHW)
        self.check_route(x_BCHW, route)
        routing = Routing(gate_gradient=False, fixed_BL=route)
        self.body(self.normalize(x_BCHW), routing)
        return torch.stack(routing.scores, 1)

    def scores(self, x_BCHW: Tensor) -> Tensor:
        """Score the experts on normalized images: (B, E), zeros (B, 1) for a dense net."""
        if self.router is None:
            return x_BCHW.new_zeros(len(x_BCHW), 1)
        parts = 1 if self.router.training else max(1, math.ceil(len(x_BCHW) / _piece(x_BCHW)))
        return at_least_float32(torch.cat([self.router(part) for part in x_BCHW.chunk(parts)]))

    def _follow(self, x_BCHW: Tensor, route: Route) -> Tensor:
        x_BCHW = x_BCHW[route.order_B] if len(route.counts) > 1 else x_BCHW
        if self.body.training:
            logits_BK = self.body(x_BCHW, Routing(route))
        else:
            cuts = route.pieces(_piece(x_BCHW))
            parts = [self.body(x_BCHW[rows], Routing(own)) for rows, own in cuts]
            logits_BK = torch.cat(parts)
        back_BK: Tensor = logits_BK[route.inverse_B] if len(route.counts) > 1 else logits_BK
        return back_BK


def _piece(x_BCHW: Tensor) -> int:
    return PIECE if x_BCHW.device.type == "cpu" else max(1, len(x_BCHW))


def is_router_parameter(name: str) -> bool:
    """Tell the router's parameters (and the layers' gates) from the experts' by their name.

    A network within another, such as a half of a dual model, may have a router of its own.
    """
    return name.startswith("router.") or ".router." in name or ".gate." in name
