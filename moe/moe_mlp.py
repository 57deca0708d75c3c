"""Mixture of MLPs by sorted dispatch: each token runs its experts, and only those are computed.

Shapes: B images, T tokens, N = B T, E experts, C experts per token, P = N C pairs, S slots, D width
and H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.token_routing import (
    AuxiliaryWeights,
    RouterKind,
    SlotRoute,
    TokenRoute,
    TokenRouter,
    TokenRouting,
    balance_statistics,
    expert_capacity,
    expert_choice,
    no_autocast,
    soft_slots,
    token_gates,
    within_capacity,
)
from moe.valid_fields import Count, NonNegative, check_fields


@dataclass(frozen=True, kw_only=True)
class TokenMixture:
    """Settings of a mixture layer of a transformer.

    Attributes:
        num_experts: E.
        top_k: Experts per token; of ``expert_choice`` and ``soft``, slots per token.
        router: ``top_k``, ``expert_choice`` or ``soft``.
        renormalize: Whether the gates of a token's experts sum to one.
        capacity: 0: no token is dropped. Else the capacity factor of ``top_k``: an expert takes
            ``moe.token_routing.expert_capacity`` pairs of a group, and the MLP's output of a
            dropped pair is zero. Then an image's answer depends on the other images of its group,
            and so does an attack on it (arXiv:2402.05526). For the other routers it scales the
            slots, and couples nothing.
        priority: Whether an expert takes tokens of large gates first (batch priority routing).
        group: Images whose tokens share an expert's capacity.
        noise_std: Of the noise on scores in training, ``N(0, (noise_std / E)^2)``.
        identical: Whether all experts start from the same weights, as in the released V-MoE code.
        weights: Of the auxiliary losses.
    """

    num_experts: int
    top_k: int = 1
    router: RouterKind = "top_k"
    renormalize: bool = False
    capacity: NonNegative = 0.0
    priority: bool = False
    group: Count = 8
    noise_std: NonNegative = 1.0
    identical: bool = False
    weights: AuxiliaryWeights = AuxiliaryWeights()

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must be from 1 to num_experts ({self.num_experts}), got {self.top_k}"
            )
        if self.renormalize and self.top_k == 1 and self.router == "top_k":
            raise ValueError(
                "top_k must be at least 2 with renormalize=true, got 1: the gate of one expert "
                "alone is always 1 and trains no router"
            )

    @property
    def couples(self) -> bool:
        """Whether an image's answer may depend on the other images of a batch."""
        return self.capacity > 0 and self.router == "top_k"

    def slots(self, tokens: int) -> int:
        """Slots of each expert for an image, of ``expert_choice`` and ``soft``."""
        factor = (self.capacity or 1.0) * self.top_k
        return min(tokens, max(1, round(tokens * factor / self.num_experts)))


class MoEMlp(nn.Module):
    """``y = sum_e gate_e MLP_e(x)`` for each token, ``MLP_e(x) = W2_e gelu(W1_e x + b1_e) + b2_e``.

    Tokens are sorted by expert, and each expert runs once on its slice: no padding, nothing for
    experts that no token chose, which get a zero gradient rather than None.

    Args:
        width, hidden: D and H.
        tokens: T, which fixes the number of slots of ``expert_choice`` and ``soft``.
        settings: Of the mixture.
    """

    def __init__(self, width: int, hidden: int, tokens: int, settings: TokenMixture):
        super().__init__()
        experts, self.settings = settings.num_experts, settings
        self.slots = settings.slots(tokens)
        self.router = TokenRouter(width, experts, kind=settings.router, slots=self.slots)
        self.up_EHD = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_bias = nn.Parameter(torch.zeros(experts * hidden))
        self.down_EDH = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_bias = nn.Parameter(torch.zeros(experts * width))
        for weight in (self.up_EHD, self.down_EDH):
            nn.init.trunc_normal_(weight, std=0.02)
            if settings.identical:
                weight.data.copy_(weight.data[:1].expand_as(weight))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.settings.num_experts

    @property
    def stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and biases of all experts: (E, H, D), (E, H), (E, D, H), (E, D)."""
        biases = (b.view(self.num_experts, -1) for b in (self.up_bias, self.down_bias))
        up_EH, down_ED = biases
        return self.up_EHD, up_EH, self.down_EDH, down_ED

    def forward(self, x_BTD: Tensor, routing: TokenRouting) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        x_ND, forced_BLT, layer = x_BTD.flatten(0, 1), routing.forced_BLT, len(routing.raw)
        scores_BTS = routing.enter(self.router(x_BTD), self.num_experts)
        if routing.relax is not None and self.settings.router != "soft":
            y_ND = self._every(x_ND, self._relaxed(scores_BTS, routing))
        elif forced_BLT is not None:
            chosen_N1 = forced_BLT[:, layer].reshape(-1, 1)
            route = TokenRoute.of(chosen_N1, self._mass(scores_BTS), self.num_experts)
            y_ND = self._sorted(x_ND, route)
        elif self.settings.router == "top_k":
            y_ND = self._sorted(x_ND, self.route(scores_BTS, routing))
        else:
            return self._slotted(x_BTD, self.slot_route(scores_BTS))
        return y_ND.view_as(x_BTD)

    def route(self, scores_BTE: Tensor, routing: TokenRouting | None = None) -> TokenRoute:
        """Route by top-k: with noise and statistics in training, within capacity if any."""
        settings, scores_NE = self.settings, scores_BTE.flatten(0, 1)
        noisy_NE, noise_std = scores_NE, 0.0
        if self.router.training and routing is not None and routing.normal is not None:
            noise_std = settings.noise_std
            noise_NE = routing.normal(scores_BTE).flatten(0, 1)
            noisy_NE = scores_NE + noise_std / self.num_experts * noise_NE
        chosen_NC, gates_NC = self._choose(noisy_NE, scores_BTE.shape[1])
        if self.router.training and routing is not None:
            routing.balance.append(balance_statistics(scores_NE, noisy_NE, chosen_NC, noise_std))
        return TokenRoute.of(chosen_NC, gates_NC, self.num_experts)

    def _choose(self, scores_NE: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        chosen_NC, gates_NC = token_gates(
            scores_NE, self.settings.top_k, renormalize=self.settings.renormalize
        )
        if self.settings.couples:
            gates_NC = gates_NC * self._kept(chosen_NC, gates_NC.detach(), tokens)
        return chosen_NC, gates_NC

    def slot_route(self, scores_BTS: Tensor) -> SlotRoute:
        """Route by expert choice or Soft MoE."""
        if self.settings.router == "soft":
            return soft_slots(scores_BTS, self.num_experts)
        return expert_choice(scores_BTS, self.slots)

    def weights(self, scores_BTS: Tensor) -> Tensor:
        """Weight of every expert in each token's output as it is deployed, (N, E)."""
        if self.settings.router != "top_k":
            return self.slot_route(scores_BTS).expert_weights.flatten(0, 1)
        chosen_NC, gates_NC = self._choose(scores_BTS.flatten(0, 1), scores_BTS.shape[1])
        return torch.zeros_like(scores_BTS.flatten(0, 1)).scatter(1, chosen_NC, gates_NC)

    def _kept(self, chosen_NC: Tensor, gates_NC: Tensor, tokens: int) -> Tensor:
        size, settings = self.settings.group * tokens, self.settings
        groups = zip(torch.split(chosen_NC, size), torch.split(gates_NC, size), strict=True)
        return torch.cat(
            [
                within_capacity(
                    chosen,
                    gates,
                    self.num_experts,
                    expert_capacity(
                        len(chosen), settings.top_k, settings.capacity, self.num_experts
                    ),
                    priority=settings.priority,
                )
                for chosen, gates in groups
            ]
        )

    def _mass(self, scores_BTS: Tensor) -> Tensor:
        return self.weights(scores_BTS).sum(1, keepdim=True)

    def _relaxed(self, scores_BTS: Tensor, routing: TokenRouting) -> Tensor:
        assert routing.relax is not None
        weights_NE = self.weights(scores_BTS)
        soft_NE = weights_NE.sum(1, keepdim=True) * routing.relax(scores_BTS.flatten(0, 1))
        if not routing.hard_forward:
            return soft_NE
        return weights_NE.detach() + soft_NE - soft_NE.detach()

    def _sorted(self, x_ND: Tensor, route: TokenRoute) -> Tensor:
        return route.combine(self.experts(route.dispatch(x_ND), route.counts_E))

    def _every(self, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
        counts_E = torch.full((self.num_experts,), len(x_ND), device=x_ND.device)
        y_PD = self.experts(x_ND.repeat(self.num_experts, 1), counts_E)
        y_END = torch.unflatten(y_PD, 0, (self.num_experts, -1))
        return torch.einsum("ne,end->nd", weights_NE.to(y_END.dtype), y_END)

    def _slotted(self, x_BTD: Tensor, route: SlotRoute) -> Tensor:
        slots_BSD = route.dispatch_BTS.to(x_BTD.dtype).transpose(1, 2) @ x_BTD
        x_EBSD = torch.unflatten(slots_BSD, 1, (self.num_experts, -1)).transpose(0, 1)
        device = x_BTD.device if x_BTD.is_cuda else "cpu"
        each = x_EBSD.shape[1] * x_EBSD.shape[2]
        counts_E = torch.full((self.num_experts,), each, device=device)
        y_PD = self.experts(x_EBSD.flatten(0, 2), counts_E)
        y_BESD = y_PD.view(x_EBSD.shape).transpose(0, 1)
        y_BTD: Tensor = route.combine_BTS.to(y_PD.dtype) @ y_BESD.flatten(1, 2)
        return y_BTD

    def experts(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        """Run each expert on its slice of sorted rows, (P, D)."""
        stacks = self.stacks
        if x_PD.is_cuda and (dtype := grouped_dtype(x_PD)) is not None:
            return grouped_mlp(x_PD.to(dtype), counts_E, *(stack.to(dtype) for stack in stacks))
        # unbind: indexing weight[e] costs a full-size zero gradient for each expert
        members = zip(
            torch.split(x_PD, counts_E.tolist()), *(s.unbind() for s in stacks), strict=True
        )
        parts = [
            F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)
            for x, up, up_bias, down, down_bias in members
            if len(x)
        ]
        return torch.cat(parts)


def grouped_dtype(x_PD: Tensor) -> torch.dtype | None:
    """Return bf16 where ``F.grouped_mm`` runs the experts of a CUDA device without a host sync."""
    device = x_PD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_PD.dtype
    able = dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_PD.device) >= (8, 0)
    return dtype if able else None


def grouped_mlp(
    x_PD: Tensor,
    counts_E: Tensor,
    up_EHD: Tensor,
    up_EH: Tensor,
    down_EDH: Tensor,
    down_ED: Tensor,
) -> Tensor:
    """Run the experts by one grouped product per layer; widths must be multiples of 16 bytes.

    ``F.grouped_mm`` takes no bias and ignores autocast; biases come by a product with one-hot
    rows, whose gradient is deterministic.
    """
    ends_E = counts_E.cumsum(0)
    rows_P = torch.arange(len(x_PD), device=x_PD.device)
    member_PE = F.one_hot(torch.searchsorted(ends_E, rows_P, right=True), len(ends_E))
    member_PE, offsets_E = member_PE.to(x_PD.dtype), ends_E.to(torch.int32)
    with no_autocast(x_PD):
        h_PH = F.grouped_mm(x_PD, up_EHD.transpose(1, 2), offs=offsets_E) + member_PE @ up_EH
        y_PD = F.grouped_mm(F.gelu(h_PH), down_EDH.transpose(1, 2), offs=offsets_E)
        return y_PD + member_PE @ down_ED
