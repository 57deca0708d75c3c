"""What the convolutional backbones share.

Shapes: B images, C channels, HW sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import ConvNorm, MoEConv2d, plain_conv
from moe.network import Network
from moe.normalize import Normalize
from moe.routing import Routing

Make = Callable[[int, int, int, int], ConvNorm]  # in channels, out channels, kernel, stride


def check(num_experts: int, ratio: float, router_scope: str) -> None:
    """Refuse settings that no backbone can build.

    Raises:
        ValueError: A setting is out of its range; the message names it, its value and the range.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    if router_scope not in ("shared", "per_layer"):
        raise ValueError(f"router_scope must be shared or per_layer, got {router_scope!r}")


def scaled(width: int, ratio: float) -> int:
    """Width of one expert, ``int(r * width)`` (AdvMoE, section 3).

    Raises:
        ValueError: The ratio leaves no channel.
    """
    if (channels := int(ratio * width)) < 1:
        raise ValueError(f"ratio {ratio} leaves no channel of {width}; at least {1 / width} does")
    return channels


def mixture(num_experts: int, router_scope: str) -> Make:
    """Make a maker of mixture convolutions with BatchNorm."""

    def make(in_channels: int, out_channels: int, kernel: int, stride: int) -> ConvNorm:
        conv = MoEConv2d(
            in_channels,
            out_channels,
            kernel,
            num_experts=num_experts,
            stride=stride,
            gated=router_scope == "per_layer",
        )
        return ConvNorm(conv, out_channels)

    return make


def plain(in_channels: int, out_channels: int, kernel: int, stride: int) -> ConvNorm:
    """Make a convolution with BatchNorm that all images share."""
    return ConvNorm(plain_conv(in_channels, out_channels, kernel, stride), out_channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (He et al., 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int, make: Make, project: Make):
        super().__init__()
        self.conv1 = make(in_channels, channels, 3, stride)
        self.conv2 = make(channels, channels, 3, 1)
        changes = stride != 1 or in_channels != channels
        self.shortcut = project(in_channels, channels, 1, stride) if changes else None

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        y_BCHW = F.relu(self.conv1(x_BCHW, routing), inplace=True)
        y_BCHW = self.conv2(y_BCHW, routing)
        if self.shortcut is not None:
            x_BCHW = self.shortcut(x_BCHW, routing)
        return F.relu(y_BCHW.add_(x_BCHW), inplace=True)


def assemble(
    body: nn.Module,
    router: Callable[[], nn.Module],
    *,
    num_experts: int,
    router_scope: str,
    statistics: str = "cifar",
) -> Network:
    """Join a body with its router; a dense net and a self-routing body get none."""
    layers = [m for m in body.modules() if isinstance(m, MoEConv2d) and m.gate is not None]
    alone = num_experts == 1 or router_scope == "per_layer"
    return Network(
        body,
        None if alone else router(),
        normalize=Normalize(statistics),
        num_experts=num_experts,
        num_layers=len(layers),
    )
