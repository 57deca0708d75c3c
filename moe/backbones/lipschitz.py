"""A net without BatchNorm, for certificates that say something: ours, after Anil et al.

Shapes: B images, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from moe.backbones.base import RouterScope
from moe.backbones.blocks import assemble, scaled
from moe.network import Network
from moe.routing import Routing, at_least_float32
from moe.valid_fields import Count, Ratio, check_fields


class MaxMinBody(nn.Module):
    """Linear maps of the flattened image with MaxMin between them.

    MaxMin sorts pairs of features: it moves no further than its inputs, and unlike ReLU it forgets
    nothing, so that depth need not shrink what the bounded layers let through (GroupSort with
    groups of two; Anil et al., ICML 2019, arXiv:1811.05381).
    """

    def __init__(self, sizes: tuple[int, ...], num_classes: int):
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        x_BF = x_BCHW.flatten(1)
        for layer in self.hidden:
            one, other = layer(x_BF).chunk(2, 1)
            x_BF = torch.cat([torch.maximum(one, other), torch.minimum(one, other)], 1)
        logits_BK: Tensor = self.head(x_BF)
        return at_least_float32(logits_BK)


@dataclass(frozen=True, kw_only=True)
class Lipschitz:
    """``depth`` hidden layers of ``width`` features with MaxMin, and a linear head.

    Made for ``norm_bound``, which keeps the sum of absolute weights into each feature small: with
    it a certificate holds at radii that matter, on small images. The network is dense; a mixture of
    such experts is ``backbone=mixture backbone.expert=lipschitz``.

    Attributes:
        num_experts: 1.
        ratio: Share of the width, in (0, 1].
        router_scope: Not used.
        width: Features of a hidden layer, even.
        depth: Hidden layers.
    """

    num_experts: Count = 1
    ratio: Ratio = 1.0
    router_scope: RouterScope = "shared"
    width: Count = 256
    depth: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_experts != 1:
            raise ValueError(
                f"num_experts must be 1, got {self.num_experts}; a mixture of such networks is "
                "backbone=mixture backbone.expert=lipschitz"
            )
        if scaled(self.width, self.ratio) % 2:
            raise ValueError(f"width times ratio must be even, got {self.width} x {self.ratio}")

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        sizes = (3 * image_size**2, *[scaled(self.width, self.ratio)] * self.depth)
        body = MaxMinBody(sizes, num_classes)
        statistics = "imagenet" if image_size > 64 else "cifar"
        return assemble(
            body, nn.Identity, num_experts=1, router_scope="shared", statistics=statistics
        )
