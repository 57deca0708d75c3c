"""What the convolutional backbones share.

Shapes: B images, C channels, HW sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import ConvNorm, MoEConv2d, plain_conv
from moe.network import Network
from moe.normalize import Normalize
from moe.routers import NOWHERE
from moe.routing import Routing, at_least_float32

Make = Callable[[int, int, int, int], ConvNorm]  # in channels, out channels, kernel, stride
MakeConv = Callable[[int, int, int, int], MoEConv2d]
Activation = Literal["relu", "silu", "softplus"]
Act = Callable[[Tensor], Tensor]


def relu(x: Tensor) -> Tensor:
    """Rectify in place: what comes in is gone."""
    return F.relu(x, inplace=True)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(a x)) / a`` with a = 10: nowhere more than 0.07 above ReLU."""
    return F.softplus(x, beta=10)


ACTIVATIONS: dict[Activation, Act] = {"relu": relu, "silu": F.silu, "softplus": softplus}
"""Smooth ones give an attack in training better gradients, and so the training a harder attack
(Xie et al., 2020, arXiv:2006.14536); ``softplus`` is the parametric one of that paper."""


def scaled(width: int, ratio: float) -> int:
    """Width of one expert, ``int(r * width)`` (AdvMoE, section 3).

    Raises:
        ValueError: The ratio leaves no channel.
    """
    if (channels := int(ratio * width)) < 1:
        raise ValueError(f"ratio {ratio} leaves no channel of {width}; at least {1 / width} does")
    return channels


def mixture_conv(num_experts: int, router_scope: str) -> MakeConv:
    """Make a maker of mixture convolutions that no BatchNorm follows."""

    def make(in_channels: int, out_channels: int, kernel: int, stride: int) -> MoEConv2d:
        return MoEConv2d(
            in_channels,
            out_channels,
            kernel,
            num_experts=num_experts,
            stride=stride,
            gated=router_scope == "per_layer",
        )

    return make


def mixture(num_experts: int, router_scope: str) -> Make:
    """Make a maker of mixture convolutions with BatchNorm."""
    conv = mixture_conv(num_experts, router_scope)

    def make(in_channels: int, out_channels: int, kernel: int, stride: int) -> ConvNorm:
        return ConvNorm(conv(in_channels, out_channels, kernel, stride), out_channels)

    return make


def plain(in_channels: int, out_channels: int, kernel: int, stride: int) -> ConvNorm:
    """Make a convolution with BatchNorm that all images share."""
    return ConvNorm(plain_conv(in_channels, out_channels, kernel, stride), out_channels)


class LargeStem(nn.Module):
    """7x7 convolution and 3x3 max pooling, both of stride 2: a quarter of the side is left.

    The stem that ImageNet nets share (He et al., CVPR 2016, table 1).
    """

    def __init__(self, channels: int, act: Act):
        super().__init__()
        self.conv, self.act = plain(3, channels, 7, 2), act

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.max_pool2d(self.act(self.conv(x_BCHW, NOWHERE)), 3, 2, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (He et al., 2016)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        make: Make,
        project: Make,
        act: Act = relu,
    ):
        super().__init__()
        self.conv1 = make(in_channels, channels, 3, stride)
        self.conv2 = make(channels, channels, 3, 1)
        changes = stride != 1 or in_channels != channels
        self.shortcut = project(in_channels, channels, 1, stride) if changes else None
        self.act = act

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        y_BCHW = self.act(self.conv1(x_BCHW, routing))
        y_BCHW = self.conv2(y_BCHW, routing)
        if self.shortcut is not None:
            x_BCHW = self.shortcut(x_BCHW, routing)
        return self.act(y_BCHW.add_(x_BCHW))


class PreActBody(nn.Module):
    """Stem, blocks that begin with BatchNorm, a last BatchNorm, pooling, a linear classifier."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        channels: int,
        num_classes: int,
        act: Act,
    ):
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(blocks)
        self.norm, self.act = nn.BatchNorm2d(channels), act
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, routing)
        logits_BK: Tensor = self.head(self.act(self.norm(x_BCHW)).mean((2, 3)))
        return at_least_float32(logits_BK)


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
