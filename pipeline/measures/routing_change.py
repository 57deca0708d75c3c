"""What an attack does to the routes: pure functions of routes, scores and outcomes.

Shapes: N images, E experts, L self-routing layers, K experts that one decision takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routing_stats import flip_rate


def flip_rates(before: Tensor, after: Tensor, stands_N: Tensor) -> dict[str, float]:
    """Share of decisions that an attack changed: of all images, the broken and the surviving.

    A group without an image has no rate and is left out.

    Args:
        before, after: Routes of the clean and the attacked images, (N,) or (N, L).
        stands_N: bool. Which images stand against the attack.
    """
    groups = {"all": torch.ones_like(stands_N), "broken": ~stands_N, "surviving": stands_N}
    return {
        name: float(flip_rate(before[rows_N], after[rows_N]))
        for name, rows_N in groups.items()
        if bool(rows_N.any())
    }


def flip_matrix(before: Tensor, after: Tensor, num_experts: int) -> Tensor:
    """Count decisions by the expert before (rows) and after (columns), int64 (E, E)."""
    cells = torch.bincount(
        before.flatten() * num_experts + after.flatten(), minlength=num_experts**2
    )
    return cells.view(num_experts, num_experts)


def expert_overlap(before: Tensor, after: Tensor, num_experts: int) -> Tensor:
    """Mean intersection over union of the experts chosen before and after, a value a layer, (L,).

    ``|A and B| / |A or B|``, 1 where both are empty: routing changes of V-MoE are 1 minus this
    (Puigcerver et al., NeurIPS 2022, arXiv:2210.10253). With one expert a decision it is the share
    of equal choices.

    Args:
        before, after: Routes (N,), (N, L) or (N, L, K); index -1 stands for no expert.
    """
    shape = before.shape if before.dim() > 1 else (len(before), 1)
    sets = [_chosen(route.view(*shape[:2], -1), num_experts) for route in (before, after)]
    shared_NL = (sets[0] & sets[1]).sum(-1)
    joint_NL = (sets[0] | sets[1]).sum(-1)
    iou_NL = torch.where(joint_NL > 0, shared_NL / joint_NL.clamp(min=1), 1.0)
    mean_L: Tensor = iou_NL.mean(0)
    return mean_L


def router_margin(scores: Tensor) -> Tensor:
    """Gap between the two highest scores, (N,) or (N, L): how far a decision is from another.

    Raises:
        ValueError: There is one expert, and nothing to decide.
    """
    if scores.shape[-1] < 2:
        raise ValueError(f"a router margin needs at least 2 experts, got {scores.shape[-1]}")
    top = scores.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def _chosen(route_NLK: Tensor, num_experts: int) -> Tensor:
    """Turn indices into sets, bool (N, L, E)."""
    named = route_NLK[..., None] == torch.arange(num_experts, device=route_NLK.device)
    return named.any(-2)
