"""Token routing of sparse vision transformers: top-k, expert choice and Soft MoE, their losses.

Each token of each mixture layer chooses its own experts (V-MoE; Riquelme et al., NeurIPS 2021,
arXiv:2106.05974). The choice per image is ``moe.routing.Route``.

Shapes: B images, T tokens of an image, N = B T tokens, E experts, C experts per token, P = N C
pairs of a token and an expert, S slots (of all experts together), D width, L mixture layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.routing import at_least_float32, best

RouterKind = Literal["top_k", "expert_choice", "soft"]
ROUTER_KINDS: tuple[RouterKind, ...] = ("top_k", "expert_choice", "soft")
Relaxation = Callable[[Tensor], Tensor]
"""From router scores (N, E) to weights of all experts (N, E) that sum to one."""
STATISTICS = ("importance", "load", "first", "gate", "z")


@dataclass(frozen=True)
class TokenRoute:
    """Experts of each token, sorted by expert so that each expert's tokens are a slice.

    Attributes:
        chosen_NC: Experts of each token, best first.
        gates_NC: Weight of each in the output; 0 where capacity dropped the pair.
        order_P: Sorted position to pair ``n C + c``; ties keep the order of the tokens.
        inverse_P: Pair to sorted position.
        counts_E: Pairs of each expert, on the device.
    """

    chosen_NC: Tensor
    gates_NC: Tensor
    order_P: Tensor
    inverse_P: Tensor
    counts_E: Tensor

    @staticmethod
    def of(chosen_NC: Tensor, gates_NC: Tensor, num_experts: int) -> TokenRoute:
        """Sort given choices; every expert index must be below ``num_experts``."""
        chosen_P = chosen_NC.flatten()
        if chosen_P.is_meta:  # no numbers, only shapes to count by: see moe.cost
            counts_E = torch.tensor([len(chosen_P), *[0] * (num_experts - 1)], device="cpu")
        else:
            counts_E = torch.bincount(chosen_P, minlength=num_experts)
        narrow_P = chosen_P.to(torch.int16)  # a stable sort of int16 is a radix sort on a CPU
        order_P = narrow_P.argsort(stable=True)
        inverse_P = torch.empty_like(order_P)
        inverse_P.scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
        return TokenRoute(chosen_NC, gates_NC, order_P, inverse_P, counts_E)

    @property
    def counts(self) -> list[int]:
        """Pairs of each expert, as host numbers."""
        counts: list[int] = self.counts_E.tolist()
        return counts

    def dispatch(self, x_ND: Tensor) -> Tensor:
        """Copy tokens to the sorted order of their pairs, (P, D)."""
        x_PD: Tensor = _Dispatch.apply(x_ND, self.order_P, self.inverse_P)  # type: ignore[no-untyped-call]
        return x_PD

    def combine(self, y_PD: Tensor) -> Tensor:
        """Sum each token's expert outputs by its gates, (N, D).

        By the inverse permutation and a sum over C: deterministic on every device, where an
        ``index_add_`` on CUDA is not.
        """
        y_PD = _Undo.apply(y_PD, self.order_P, self.inverse_P)  # type: ignore[no-untyped-call]
        gates_NC = self.gates_NC.to(y_PD.dtype)
        if gates_NC.shape[1] == 1:
            return y_PD * gates_NC
        y_ND: Tensor = (torch.unflatten(y_PD, 0, gates_NC.shape) * gates_NC[..., None]).sum(1)
        return y_ND


class _Dispatch(torch.autograd.Function):
    """``x[order // C]``; the gradient gathers by the inverse and sums over C, deterministic."""

    @staticmethod
    def forward(ctx: object, x_ND: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        each = len(order_P) // max(1, len(x_ND))
        ctx.save_for_backward(inverse_P)  # type: ignore[attr-defined]
        ctx.each = each  # type: ignore[attr-defined]
        rows_P = order_P if each == 1 else order_P.div(each, rounding_mode="floor")
        return x_ND.index_select(0, rows_P)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_P,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_PD, each = grads[0].index_select(0, inverse_P), ctx.each  # type: ignore[attr-defined]
        return grad_PD if each == 1 else torch.unflatten(grad_PD, 0, (-1, each)).sum(1), None, None


class _Undo(torch.autograd.Function):
    """``y[inverse]``; the gradient gathers by the order, so nothing is added up."""

    @staticmethod
    def forward(ctx: object, y_PD: Tensor, order_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P)  # type: ignore[attr-defined]
        return y_PD.index_select(0, inverse_P)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_P,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].index_select(0, order_P), None, None


@dataclass(frozen=True)
class SlotRoute:
    """Inputs of the experts as mixtures of an image's tokens: expert choice and Soft MoE.

    Attributes:
        dispatch_BTS: Weight of each token in each slot.
        combine_BTS: Weight of each slot's output in each token's.
        num_experts: E; the slots of one expert are next to each other.
    """

    dispatch_BTS: Tensor
    combine_BTS: Tensor
    num_experts: int

    @property
    def expert_weights(self) -> Tensor:
        """Weight of each expert in each token's output, (B, T, E)."""
        weights_BTE: Tensor = torch.unflatten(self.combine_BTS, 2, (self.num_experts, -1)).sum(3)
        return weights_BTE


def token_gates(
    scores_NE: Tensor, top_k: int, *, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose the ``top_k`` experts of each token, and their gates: both (N, C), best first.

    Gates are those of a softmax over all E experts (V-MoE, arXiv:2106.05974, eq. 3): they sum to
    less than one, unless ``renormalize`` divides them by their sum. Ties go to the lowest index.
    """
    soft_NE = scores_NE.softmax(1)
    chosen_NC = scores_NE.argmax(1, keepdim=True) if top_k == 1 else best(scores_NE, top_k)
    gates_NC = soft_NE.gather(1, chosen_NC)
    return chosen_NC, gates_NC / gates_NC.sum(1, keepdim=True) if renormalize else gates_NC


def expert_capacity(tokens: int, top_k: int, factor: float, num_experts: int) -> int:
    """Pairs that an expert takes of a group: ``ceil(tokens k factor / E)``, up to a multiple of 4.

    As in the released V-MoE code.
    """
    return 4 * math.ceil(math.ceil(tokens * top_k * factor / num_experts) / 4)


def within_capacity(
    chosen_NC: Tensor, gates_NC: Tensor, num_experts: int, capacity: int, *, priority: bool
) -> Tensor:
    """Say which pairs of one group an expert has room for, bool (N, C).

    All first choices come before all second ones; among them tokens in their order, or with
    ``priority`` those of the largest first gate first (batch priority routing, arXiv:2106.05974,
    section 4).
    """
    rank_N = gates_NC.amax(1).argsort(descending=True, stable=True) if priority else None
    ranked_NC = chosen_NC if rank_N is None else chosen_NC[rank_N]
    ranked_P = ranked_NC.t().flatten()
    taken_PE = F.one_hot(ranked_P, num_experts).cumsum(0)
    kept_P = taken_PE.gather(1, ranked_P[:, None]).squeeze(1) <= capacity
    kept_NC = kept_P.view(ranked_NC.shape[1], -1).t()
    return kept_NC if rank_N is None else torch.empty_like(kept_NC).index_copy(0, rank_N, kept_NC)


def expert_choice(scores_BTE: Tensor, slots: int) -> SlotRoute:
    """Let each expert take the ``slots`` tokens of an image that want it most.

    Gates are a softmax over the experts (Zhou et al., NeurIPS 2022, arXiv:2202.09368, eq. 2). One
    image is a group, so that an image's answer depends on no other.
    """
    gates_BET = scores_BTE.softmax(2).transpose(1, 2)
    token_BES = gates_BET.argsort(dim=2, descending=True, stable=True)[:, :, :slots]
    index_B1S = token_BES.flatten(1)[:, None]
    gate_B1S = gates_BET.gather(2, token_BES).flatten(1)[:, None]
    shape = (*scores_BTE.shape[:2], index_B1S.shape[2])  # len() would fix a traced batch size
    dispatch_BTS = scores_BTE.new_zeros(shape).scatter(1, index_B1S, 1.0)
    return SlotRoute(dispatch_BTS, dispatch_BTS * gate_B1S, scores_BTE.shape[2])


def soft_slots(scores_BTS: Tensor, num_experts: int) -> SlotRoute:
    """Mix all tokens into each slot, and all slots into each token (Soft MoE, arXiv:2308.00951).

    Dispatch weights are a softmax over the tokens of an image, combine weights one over its slots.
    """
    return SlotRoute(scores_BTS.softmax(1), scores_BTS.softmax(2), num_experts)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on a tensor's device, where there is such a thing."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


class TokenRouter(nn.Module):
    """Scores of the experts (or, of Soft MoE, of their slots) for each token, always in float32.

    ``x W`` without a bias. ``soft`` has x and the columns of W normalized to length 1 and one
    learnable scale (arXiv:2308.00951, section 2.3).

    Args:
        width: D.
        num_experts: E.
        slots: Slots per expert, for ``soft``.
        kind: Of the router.
    """

    def __init__(self, width: int, num_experts: int, *, kind: RouterKind, slots: int = 1):
        super().__init__()
        columns = num_experts * (slots if kind == "soft" else 1)
        self.kind = kind
        self.weight_SD = nn.Parameter(torch.empty(columns, width))
        self.scale = nn.Parameter(torch.ones(())) if kind == "soft" else None
        nn.init.trunc_normal_(self.weight_SD, std=0.02 if kind != "soft" else width**-0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map tokens to scores (B, T, E) or (B, T, S)."""
        with no_autocast(x_BTD):
            weight_SD: Tensor = self.weight_SD
            x_BTD = at_least_float32(x_BTD)
            if self.scale is not None:
                x_BTD = F.normalize(x_BTD, dim=-1, eps=1e-6)
                weight_SD = self.scale * F.normalize(weight_SD, dim=1, eps=1e-6)
            return F.linear(x_BTD, weight_SD)


@dataclass
class TokenRouting:
    """The routing of one forward pass, handed from mixture layer to mixture layer.

    Attributes:
        normal: Draws standard normal numbers shaped like its argument (B, T, E), for the routers'
            noise in training; None: no noise.
        held: Scores to route by in place of each layer's own, in order: (B, T, E) or (B, T, S).
        forced_BLT: Experts to send each token to, with the gates' sum of the token's own choice.
        relax: Weights of all experts that take the place of hard choices, times the sum of the
            gates of the token's own choice.
        hard_forward: Whether ``relax`` counts in the gradient alone.
        raw: What each layer's router gave, in order.
        scores: The same as scores per expert, (B, T, E).
        balance: Statistics of each layer for the auxiliary losses, (len(STATISTICS), E).
    """

    normal: Callable[[Tensor], Tensor] | None = None
    held: list[Tensor] | None = None
    forced_BLT: Tensor | None = None
    relax: Relaxation | None = None
    hard_forward: bool = False
    raw: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)

    def enter(self, scores_BTS: Tensor, num_experts: int) -> Tensor:
        """Keep a layer's scores for the output; return those that it routes by."""
        if self.held is not None:
            scores_BTS = self.held[len(self.raw)]
        self.raw.append(scores_BTS)
        slots = scores_BTS.shape[2] // num_experts
        per_expert = torch.unflatten(scores_BTS, 2, (num_experts, slots))
        self.scores.append(scores_BTS if slots == 1 else per_expert.logsumexp(3))
        return scores_BTS


def balance_statistics(
    scores_NE: Tensor, noisy_NE: Tensor, chosen_NC: Tensor, noise_std: float
) -> Tensor:
    """Means over tokens that the auxiliary losses are functions of, (len(STATISTICS), E).

    ``importance``: softmax of the scores without noise. ``load``: the probability that the expert
    is among the k best if its noise is drawn again, ``1 - Phi((t - s_e) / sigma)``, t the k-th
    largest noisy score and ``sigma = noise_std / E``; without noise the share of tokens that chose
    it. ``first``: share of tokens whose first choice it is. ``gate``: softmax of the noisy scores.
    ``z``: squared log-sum-exp of the scores, the same in every column.

    Means, so that those of several workers average to those of the whole batch.
    """
    experts = scores_NE.shape[1]
    if noise_std > 0:
        threshold_N1 = noisy_NE.gather(1, chosen_NC[:, -1:])
        load_NE = torch.special.ndtr((scores_NE - threshold_N1) * (experts / noise_std))
    else:
        load_NE = torch.zeros_like(scores_NE).scatter(1, chosen_NC, 1.0)
    first_NE = F.one_hot(chosen_NC[:, 0], experts).to(scores_NE.dtype)
    z_NE = scores_NE.logsumexp(1, keepdim=True).square().expand_as(scores_NE)
    parts = (scores_NE.softmax(1), load_NE, first_NE, noisy_NE.softmax(1), z_NE)
    return torch.stack([part.mean(0) for part in parts])


def squared_variation(mean_E: Tensor) -> Tensor:
    """``(std / mean)^2`` over experts, std of the population: 0 where all are used alike."""
    square: Tensor = mean_E.var(-1, unbiased=False) / mean_E.mean(-1).square()
    return square


def gshard_loss(gate_E: Tensor, first_E: Tensor) -> Tensor:
    """``E^2 mean_e(mean gate_e * share of first choices_e)`` (GShard, arXiv:2006.16668)."""
    product: Tensor = (gate_E * first_E).mean(-1) * gate_E.shape[-1] ** 2
    return product


@dataclass(frozen=True)
class AuxiliaryWeights:
    """Weights of the auxiliary losses; those of the released V-MoE code but for ``z``.

    Attributes:
        importance, load: For more than two experts.
        gshard: For two experts, in place of both.
        z: Of ``mean(logsumexp^2)`` (ST-MoE, arXiv:2202.08906), 1e-3 there.
    """

    importance: float = 0.005
    load: float = 0.005
    gshard: float = 0.01
    z: float = 0.0


def auxiliary_loss(balance_LSE: Tensor, weights: AuxiliaryWeights) -> Tensor:
    """Weighted sum of the auxiliary losses, summed over layers as in the released V-MoE code.

    Args:
        balance_LSE: ``balance_statistics`` of each layer, averaged over all images of all workers.
    """
    importance, load, first, gate, z = balance_LSE.unbind(1)
    if balance_LSE.shape[2] == 2:
        loss_L = weights.gshard * gshard_loss(gate, first)
    else:
        loss_L = weights.importance * squared_variation(importance)
        loss_L = loss_L + weights.load * squared_variation(load)
    total: Tensor = (loss_L + weights.z * z.mean(1)).sum()
    return total
