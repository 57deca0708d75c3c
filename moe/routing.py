"""Which expert sees which image.

Shapes: B images, E experts, K classes, L mixture layers, CHW channels and sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """What a model returns: nothing about a forward pass is left behind on its layers.

    Attributes:
        logits: Class scores (B, K).
        router: Router scores (B, E); (B, L, E) where every layer, or every token of every layer,
            routes for itself; zeros (B, 1) for a dense net.
        route: Chosen experts, int64, (B,) or (B, L); of several experts a token the first.
        balance: Means over the batch that auxiliary losses are made of, see
            ``moe.token_routing.auxiliary_loss``; None where there are none.
    """

    logits: Tensor
    router: Tensor
    route: Tensor
    balance: Tensor | None = None


def at_least_float32(x: Tensor) -> Tensor:
    """Widen bf16 and fp16 to float32; float64 keeps its precision."""
    return x.float() if x.element_size() < 4 else x


def straight_through_top1(scores_BE: Tensor) -> Tensor:
    """Turn scores into one-hot gates (B, E) that pass a gradient to the chosen score only.

    ``g = onehot(argmax s)`` forward and ``dg_e / ds_e = [e chosen]`` backward: the gate of AdvMoE
    (Zhang et al., ICCV 2023, arXiv:2308.10110). Ties go to the lowest index.
    """
    chosen_BE = torch.zeros_like(scores_BE).scatter(1, scores_BE.argmax(1, keepdim=True), 1.0)
    return chosen_BE * (1.0 + scores_BE - scores_BE.detach())


def best(scores_BE: Tensor, top_k: int) -> Tensor:
    """Name the best experts of each image, best first (B, C); ties go to the lowest index."""
    return scores_BE.argsort(dim=1, descending=True, stable=True)[:, :top_k]


@dataclass(frozen=True)
class Route:
    """One decision for a batch: images sorted by expert, so that each expert's are a slice.

    Attributes:
        order_B: Sorted position to batch position; ties keep the order of the batch.
        inverse_B: Batch position to sorted position.
        counts: Images per expert, one host number each.
        gate_B: Gates of the chosen experts in sorted order, all ones; they carry the
            straight-through gradient to the scores, or nothing where the scores need none.
        chosen_B: Expert of each image, in the order of the batch.
    """

    order_B: Tensor
    inverse_B: Tensor
    counts: tuple[int, ...]
    gate_B: Tensor
    chosen_B: Tensor

    @staticmethod
    def top1(scores_BE: Tensor) -> Route:
        """Send each image to its best-scored expert."""
        return Route.fixed(scores_BE.argmax(1), scores_BE)

    @staticmethod
    def fixed(chosen_B: Tensor, scores_BE: Tensor) -> Route:
        """Send each image to a given expert; gates are tied to that expert's score.

        Raises:
            ValueError: An index has no expert, or the batch sizes differ.
        """
        batch, experts = scores_BE.shape
        if chosen_B.shape != (batch,):
            raise ValueError(f"route has shape {tuple(chosen_B.shape)}, want {(batch,)}")
        if chosen_B.is_meta:  # no numbers, only shapes to count by: see moe.cost
            counts = [batch, *[0] * (experts - 1)]
        else:
            counts = torch.bincount(chosen_B, minlength=experts).tolist()
        if len(counts) > experts:
            raise ValueError(f"route names expert {len(counts) - 1}, valid are 0 to {experts - 1}")
        order_B = chosen_B.argsort(stable=True)
        inverse_B = torch.empty_like(order_B).scatter_(
            0, order_B, torch.arange(batch, device=order_B.device)
        )
        score_B = scores_BE.gather(1, chosen_B[:, None]).squeeze(1)[order_B]
        gate_B = 1.0 + score_B - score_B.detach()
        return Route(order_B, inverse_B, tuple(counts), gate_B, chosen_B)

    def piece(self, expert: int, rows: slice) -> Route:
        """Cut sorted rows that all belong to one expert: a route for a part of the batch."""
        gate_B = self.gate_B[rows]
        counts = tuple(len(gate_B) * (e == expert) for e in range(len(self.counts)))
        here_B = torch.arange(len(gate_B), device=gate_B.device)
        return Route(here_B, here_B, counts, gate_B, torch.full_like(here_B, expert))

    def pieces(self, size: int) -> list[tuple[slice, Route]]:
        """Cut the sorted batch into even runs of at most ``size`` images with one expert each."""
        cuts, start = [], 0
        for expert, count in enumerate(self.counts):
            runs = math.ceil(count / size)
            for run in range(runs):
                rows = slice(start + count * run // runs, start + count * (run + 1) // runs)
                cuts.append((rows, self.piece(expert, rows)))
            start += count
        return cuts


@dataclass
class Routing:
    """The routing of one forward pass, handed from layer to layer.

    Attributes:
        shared: The route of the whole network, or None where every layer routes for itself.
        gate_gradient: Whether gates carry the straight-through gradient.
        fixed_BL: Experts to use in place of the layers' own choice, one column a layer.
        scores: Scores of the layers that routed so far, in order.
        chosen: Their decisions.
    """

    shared: Route | None = None
    gate_gradient: bool = True
    fixed_BL: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def decide(self, scores_BE: Tensor) -> Route:
        """Route one layer by its scores, or by the given route, and keep both for the output."""
        layer, gating_BE = len(self.scores), scores_BE
        if not self.gate_gradient:
            gating_BE = scores_BE.detach()
        if self.fixed_BL is None:
            route = Route.top1(gating_BE)
        else:
            route = Route.fixed(self.fixed_BL[:, layer], gating_BE)
        self.scores.append(scores_BE)
        self.chosen.append(route.chosen_B)
        return route
