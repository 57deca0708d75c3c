"""The dual model: a standard and a robust network, mixed by a smoothing parameter.

Shapes: B images, S and R experts of the two halves, E = S R pairs of them, K classes, CHW channels
and sides.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.network import Network
from moe.routing import Routed, at_least_float32

Mix = Literal["probabilities", "logits"]


def check_mix(alpha: float, mix: str) -> None:
    """Refuse settings of no mixture.

    Raises:
        ValueError: A setting is out of its range; the message names it, its value and the range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if mix not in ("probabilities", "logits"):
        raise ValueError(f"mix must be probabilities or logits, got {mix!r}")


def blend(standard_BK: Tensor, robust_BK: Tensor, alpha: float, mix: Mix) -> Tensor:
    """Mix the logits of two networks, ``(1 - alpha) F_S + alpha F_R``, (B, K).

    With ``probabilities`` F is a softmax, and what is returned is the logarithm of the mixture,
    whose softmax it is: cross-entropy and margins of it are those of the mixed probabilities.
    """
    if mix == "logits":
        return (1 - alpha) * standard_BK + alpha * robust_BK
    log_BK = [F.log_softmax(at_least_float32(z_BK), 1) for z_BK in (standard_BK, robust_BK)]
    if alpha in (0, 1):  # log 0 has no gradient
        return log_BK[int(alpha)]
    return torch.logaddexp(log_BK[0] + math.log(1 - alpha), log_BK[1] + math.log(alpha))


class Dual(Network):
    """``F_D = (1 - alpha) F_S + alpha F_R`` of two networks, each with normalization and router.

    The dual model of RT-ER's paper (ICML 2025, arXiv:2502.06832, section 5). It stands for a
    mixture whose experts are the pairs of an expert of either half: pair ``s R + r`` has the score
    ``score_s + score_r``, whose softmax is the product of both softmaxes, and whose best pair is
    that of both best experts. So one route (B,) says what both halves do; what attacks the router
    attacks both, a forced route tries every pair, and the floor is that over all pairs.

    Args:
        standard, robust: The halves, dense or with one router each.
        alpha: Weight of the robust half, in [0, 1]; may be changed at any time.
        mix: What is mixed: ``probabilities`` (what the certificate needs) or ``logits``.

    Raises:
        ValueError: A setting is out of its range, or a half routes in every layer: its routes are
            no pairs.
    """

    def __init__(
        self, standard: Network, robust: Network, *, alpha: float = 0.5, mix: Mix = "probabilities"
    ):
        nn.Module.__init__(self)
        check_mix(alpha, mix)
        for name, half in (("standard", standard), ("robust", robust)):
            if half.num_layers:
                raise ValueError(
                    f"{name} must have one router or none, got one in each of "
                    f"{half.num_layers} layers (router_scope=per_layer)"
                )
        self.standard, self.robust, self.alpha, self.mix = standard, robust, alpha, mix
        self.num_experts, self.num_layers = standard.num_experts * robust.num_experts, 0

    @property
    def gate_gradient(self) -> bool:  # type: ignore[override]
        """Whether the gates of the halves carry the straight-through gradient."""
        return self.robust.gate_gradient

    @gate_gradient.setter
    def gate_gradient(self, on: bool) -> None:
        self.standard.gate_gradient = self.robust.gate_gradient = on

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Classify pixels in [0, 1]."""
        standard, robust = self.standard(x_BCHW), self.robust(x_BCHW)
        route_B = standard.route * self.robust.num_experts + robust.route
        return Routed(
            self.blend(standard.logits, robust.logits),
            pair_scores(standard.router, robust.router),
            route_B,
        )

    def along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Classify along given pairs (B,): either half by its expert of the pair alone.

        Raises:
            ValueError: The route has another shape, or names a pair that is not there.
        """
        self.check_route(x_BCHW, route)
        own = route // self.robust.num_experts, route % self.robust.num_experts
        return self.blend(self.standard.along(x_BCHW, own[0]), self.robust.along(x_BCHW, own[1]))

    def decisions(self, route: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Take the pairs of a route apart: the decisions of the routers that there are."""
        many = self.robust.num_experts
        halves = ("standard", self.standard, route // many), ("robust", self.robust, route % many)
        return {
            f"{name} {word}": decision
            for name, half, own_B in halves
            for word, decision in half.decisions(own_B).items()
        }

    def held(self, x_BCHW: Tensor, scores: Tensor) -> Tensor:
        """Classify (B, K) with the routing of other images, whose scores of the pairs are given.

        A row or column of the pairs is one half's scores up to a constant, which decides nothing.
        """
        pairs_BSR = scores.view(len(scores), -1, self.robust.num_experts)
        return self.blend(
            self.standard.held(x_BCHW, pairs_BSR[:, :, 0]),
            self.robust.held(x_BCHW, pairs_BSR[:, 0, :]),
        )

    def router_scores(self, x_BCHW: Tensor) -> Tensor:
        """Score the pairs (B, E) on pixels in [0, 1]."""
        return pair_scores(self.standard.router_scores(x_BCHW), self.robust.router_scores(x_BCHW))

    def blend(self, standard_BK: Tensor, robust_BK: Tensor) -> Tensor:
        """Mix the logits of the halves."""
        return blend(standard_BK, robust_BK, self.alpha, self.mix)


def pair_scores(standard_BS: Tensor, robust_BR: Tensor) -> Tensor:
    """``score_s + score_r`` at ``s R + r``, (B, S R)."""
    return (standard_BS[:, :, None] + robust_BR[:, None, :]).flatten(1)
