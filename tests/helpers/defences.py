"""Defences that fool an evaluation rather than resist an attack, on networks that are given.

Shapes: B images, K classes, E experts, CHW channels and sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe.network import Network
from moe.routing import Routing

Logits = Callable[[Tensor], Tensor]


class Body(nn.Module):
    """A body that is a function of the images; the network's modules are kept with it."""

    def __init__(self, logits: Logits, *nets: nn.Module):
        super().__init__()
        self.logits, self.nets = logits, nn.ModuleList(nets)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        return self.logits(x_BCHW)


class Experts(nn.Module):
    """A body whose experts are whole networks."""

    def __init__(self, *nets: Network):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        assert routing.shared is not None
        parts = x_BCHW.split(list(routing.shared.counts))
        pairs = zip(self.nets, parts, strict=True)
        return torch.cat([net(x).logits for net, x in pairs if len(x)])


class Scores(nn.Module):
    """A router that is a function of the images."""

    def __init__(self, scores: Callable[[Tensor], Tensor]):
        super().__init__()
        self.scores = scores

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.scores(x_BCHW)


class Permuted(torch.autograd.Function):
    """The identity, whose gradient is that of other pixels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        order = torch.randperm(grads[0][0].numel(), generator=torch.Generator().manual_seed(0))
        return grads[0].flatten(1)[:, order].view_as(grads[0])


class Turned(torch.autograd.Function):
    """The identity, whose gradient points the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def dense(logits: Logits, *nets: nn.Module) -> Network:
    """Make a network without a router of a function."""
    return Network(Body(logits, *nets), None, normalize=nn.Identity(), num_experts=1).eval()  # type: ignore[arg-type]


def routed(scores: Callable[[Tensor], Tensor], *nets: Network) -> Network:
    """Make a mixture of whole networks that a function routes."""
    return Network(
        Experts(*nets),
        Scores(scores),
        normalize=nn.Identity(),  # type: ignore[arg-type]
        num_experts=len(nets),
    ).eval()


def coarse(x_BCHW: Tensor, bits: int) -> Tensor:
    """Pixels on a coarser grid; the gradient of it is zero."""
    levels = 2**bits - 1
    return (x_BCHW * levels).round() / levels


def off_grid(x_BCHW: Tensor) -> Tensor:
    """Scores (B, 2): the second expert's is higher where a pixel is off the 8-bit grid."""
    off_B = (255 * x_BCHW - (255 * x_BCHW).round()).abs().flatten(1).amax(1) > 1e-3
    height_B = off_B.to(x_BCHW) - 0.5 + 0 * x_BCHW.flatten(1).sum(1)
    return torch.stack([-height_B, height_B], 1)


def grid_gate(weak: Network, robust: Network) -> Network:
    """On the 8-bit grid the weak network answers, off it the robust one."""
    return routed(off_grid, weak, robust)


def hinted(net: Network, hint: Network, bits: int = 4, share: float = 1e-3) -> Network:
    """A classifier on coarse pixels, with the gradient of another one that hardly counts."""
    return dense(
        lambda x: net(coarse(x, bits)).logits + share * hint(x).logits,
        net,
        hint,
    )


def hard_gradient(net: Network, layer: Callable[[Tensor], Tensor]) -> Network:
    """A classifier behind a layer."""
    return dense(lambda x: net(layer(x)).logits, net)


def rounded_router(mixture: Network, bits: int = 2) -> Network:
    """A mixture whose router sees coarse pixels, and so has no gradient."""
    assert mixture.router is not None
    inner = mixture.router
    mixture.router = Scores(lambda x: inner(coarse_normal(x, bits)))
    return mixture


def coarse_normal(z_BCHW: Tensor, bits: int) -> Tensor:
    """Normalized pixels on a coarser grid."""
    return (z_BCHW * 2 ** (bits - 1)).round() / 2 ** (bits - 1)
