"""How evenly the experts are used.

Shapes: B images, E experts, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load(route: Tensor, num_experts: int) -> Tensor:
    """Share of decisions that each expert gets: (E,), sums to 1. ``route`` is (B,) or (B, L)."""
    counts_E = torch.bincount(route.flatten(), minlength=num_experts)
    share_E: Tensor = counts_E / max(1, route.numel())
    return share_E


def entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load in nats: 0 for one expert, log E for even use."""
    nats: Tensor = -torch.special.xlogy(load_E, load_E).sum()
    return nats


def effective_experts(load_E: Tensor) -> Tensor:
    """``exp(entropy)``: 1 for one expert, E for even use."""
    return entropy(load_E).exp()


def class_load(route_B: Tensor, y_B: Tensor, num_experts: int, num_classes: int) -> Tensor:
    """Share of each class's images that each expert gets: (K, E), rows sum to 1 (or 0)."""
    if route_B.dim() > 1:
        y_B = y_B[:, None].expand_as(route_B).flatten()
    cells = torch.bincount(
        y_B * num_experts + route_B.flatten(), minlength=num_classes * num_experts
    )
    counts_KE = cells.view(num_classes, num_experts).float()
    return counts_KE / counts_KE.sum(1, keepdim=True).clamp(min=1)


def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """Share of decisions that differ between two routes of the same images."""
    return (before != after).float().mean()
