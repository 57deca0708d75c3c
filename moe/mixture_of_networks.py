"""Whole classifiers as the experts of a mixture, each run once on the images that chose it.

Shapes: B images, E experts, C experts that take part in one image, K classes, F = B C calls.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moe.network import Network
from moe.routing import Route, Routed, best

Gate = Literal["softmax", "hard"]
Mix = Literal["probabilities", "logits"]


class LinearRouter(nn.Module):
    """Scores of the experts, affine in the pixels: one linear map of the flattened image.

    The router of RT-ER (arXiv:2502.06832). Nothing normalizes its scores,
    so they have exact Lipschitz constants, which certificates need.
    """

    def __init__(self, num_experts: int, image_size: int):
        super().__init__()
        self.linear = nn.Linear(3 * image_size**2, num_experts)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalized images to scores (B, E)."""
        scores_BE: Tensor = self.linear(x_BCHW.flatten(1))
        return scores_BE


class Mixture(Network):
    """``F(x) = sum_i a_i(x) f_i(x)``: a router weighs whole networks (arXiv:2502.06832).

    ``softmax``: a is the softmax of the scores over the ``top_k`` best experts, zero elsewhere. It
    is differentiable where the set of these experts does not change, and everywhere where all take
    part; this is the true gradient, and attacks take it whatever ``gate_gradient`` says.
    ``hard``: a is one for the best expert; with ``gate_gradient``, in training, it has the
    straight-through gradient ``da/ds = 1`` of ``moe.routing.straight_through_top1``.

    Mixed probabilities come as their logarithms, ``log sum_i a_i softmax(f_i)``: their softmax is
    the mixture itself, so that cross-entropies, divergences and margins of these outputs are those
    of F, as they are of any other network's logits. One hard expert gives the same classifier
    either way; its gate multiplies log-probabilities or logits, since a factor on probabilities
    cancels in the softmax and would leave the router without a gradient.

    An expert sees only its own images: its BatchNorm normalizes by them, and its running statistics
    are theirs. One that nobody chose is not run and gets no gradient (a training step makes it
    zero). A lone image is normalized by the running statistics and does not move them, since one
    value a channel has no variance.

    Args:
        experts: Dense networks on pixels in [0, 1], alike in their classes and normalization.
        router: From normalized images to scores (B, E).
        gate, mix: As above.
        top_k: Experts that take part in an image.

    Raises:
        ValueError: An expert is no dense net, or the gate has no use for ``top_k``.
    """

    def __init__(
        self,
        experts: Sequence[Network],
        router: nn.Module,
        *,
        gate: Gate = "softmax",
        top_k: int = 2,
        mix: Mix = "probabilities",
    ):
        check_gate(gate, top_k, len(experts), mix)
        if len(experts) < 2 or any(expert.num_experts != 1 for expert in experts):
            counts = [expert.num_experts for expert in experts]
            raise ValueError(f"experts must be two or more dense networks, got {counts} experts")
        super().__init__(
            nn.ModuleList(experts),
            router,
            normalize=copy.deepcopy(experts[0].normalize),
            num_experts=len(experts),
        )
        self.gate, self.top_k, self.mix = gate, top_k, mix

    @property
    def experts(self) -> list[Network]:
        """The experts, in the order of the router's scores."""
        assert isinstance(self.body, nn.ModuleList)
        return [expert for expert in self.body if isinstance(expert, Network)]

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Classify pixels in [0, 1]; the route is the best expert of each image."""
        scores_BE = self.router_scores(x_BCHW)
        return Routed(self.held(x_BCHW, scores_BE), scores_BE, best(scores_BE, 1)[:, 0])

    def held(self, x_BCHW: Tensor, scores: Tensor) -> Tensor:
        """Classify (B, K) with the weights that given scores (B, E) stand for."""
        if self.top_k == self.num_experts:
            scores_BC, logits_BCK = scores, self.experts_logits(x_BCHW)
        else:
            chosen_BC = best(scores, self.top_k)
            scores_BC, logits_BCK = scores.gather(1, chosen_BC), self._dispatch(x_BCHW, chosen_BC)
        return mixed(scores_BC, logits_BCK, self.gate, self.mix, self.gate_gradient)

    def along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Classify each image by one given expert alone; return that expert's logits (B, K).

        Raises:
            ValueError: The route has another shape, or names an expert that is not there.
        """
        self.check_route(x_BCHW, route)
        return self._dispatch(x_BCHW, route[:, None])[:, 0]

    def experts_logits(self, x_BCHW: Tensor) -> Tensor:
        """Classify every image by every expert: (B, E, K)."""
        return torch.stack([logits(expert, x_BCHW) for expert in self.experts], 1)

    def _dispatch(self, x_BCHW: Tensor, chosen_BC: Tensor) -> Tensor:
        """Run each expert once, on the images that chose it; return (B, C, K)."""
        batch, each = chosen_BC.shape
        chosen_F = chosen_BC.flatten()
        route = Route.fixed(chosen_F, x_BCHW.new_zeros(batch * each, self.num_experts))
        rows = torch.split(route.order_B // each, list(route.counts))
        calls = zip(self.experts, rows, strict=True)
        parts_FK = [logits(expert, x_BCHW[rows_b]) for expert, rows_b in calls if len(rows_b)]
        return torch.cat(parts_FK)[route.inverse_B].view(batch, each, -1)


def check_gate(gate: str, top_k: int, num_experts: int, mix: str) -> None:
    """Refuse settings with which no mixture can be trained.

    Raises:
        ValueError: A setting is out of its range; the message names it, its value and the range.
    """
    if gate not in ("softmax", "hard"):
        raise ValueError(f"gate must be softmax or hard, got {gate!r}")
    if mix not in ("probabilities", "logits"):
        raise ValueError(f"mix must be probabilities or logits, got {mix!r}")
    if gate == "hard" and top_k != 1:
        raise ValueError(f"top_k must be 1 for gate=hard, got {top_k}")
    if gate == "softmax" and num_experts > 1 and not 2 <= top_k <= num_experts:
        raise ValueError(
            f"top_k must be from 2 to num_experts ({num_experts}) for gate=softmax, got {top_k}: "
            "the weight of one expert alone is always 1 and trains no router, gate=hard does"
        )


def mixed(
    scores_BC: Tensor, logits_BCK: Tensor, gate: Gate, mix: Mix, gate_gradient: bool = False
) -> Tensor:
    """Mix the outputs of the experts that take part, as ``Mixture`` says: (B, K)."""
    z_BCK = logits_BCK if mix == "logits" else logits_BCK.log_softmax(2)
    if gate == "hard":
        tie_BC = scores_BC - scores_BC.detach() if gate_gradient else torch.zeros_like(scores_BC)
        return (1.0 + tie_BC) * z_BCK[:, 0]
    if mix == "logits":
        return torch.einsum("bc,bck->bk", scores_BC.softmax(1), z_BCK)
    return torch.logsumexp(scores_BC.log_softmax(1)[:, :, None] + z_BCK, 1)


def logits(expert: Network, x_BCHW: Tensor) -> Tensor:
    """Run one expert, with still BatchNorm where it trains on one image alone."""
    if expert.training and len(x_BCHW) == 1:
        with _normalized_as_deployed(expert):
            lone_1K: Tensor = expert(x_BCHW).logits
        return lone_1K
    logits_BK: Tensor = expert(x_BCHW).logits
    return logits_BK


@contextmanager
def _normalized_as_deployed(expert: nn.Module) -> Iterator[None]:
    norms = [m for m in expert.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
