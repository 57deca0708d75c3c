"""Pseudo labels of AdvMoE's router: the expert that each class is sent to.

Shapes: B images, K classes, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Homes = Literal["mod", "superclass"]


def home_of(homes: Homes, y_B: Tensor, groups: tuple[int, ...], num_experts: int) -> Tensor:
    """Expert (B,) of classes (B,).

    ``mod``: ``y mod E``, as in the code of arXiv:2308.10110, which spreads classes that look alike
    over all experts. ``superclass``: the G groups of the data set in blocks, ``group * E // G``.

    Args:
        groups: Group of each class, numbers from 0, see ``pipeline.data.base.class_groups``.

    Raises:
        ValueError: ``superclass`` for a data set without groups, or with fewer than E.
    """
    if homes == "mod":
        return y_B % num_experts
    if not groups:
        raise ValueError(
            "algorithm.homes superclass needs a data set with groups of classes (cifar10, "
            "cifar100); this one has none: use mod"
        )
    if (count := max(groups) + 1) < num_experts:
        raise ValueError(
            f"algorithm.homes superclass has {count} groups here, so backbone.num_experts must be "
            f"at most {count}, got {num_experts}"
        )
    expert_K = torch.tensor([group * num_experts // count for group in groups], device=y_B.device)
    return expert_K[y_B]
