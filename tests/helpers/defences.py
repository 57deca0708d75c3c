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


def one_hot(logits_BK: Tensor) -> Tensor:
    """A code of the answer, without a gradient."""
    return nn.functional.one_hot(logits_BK.argmax(1), logits_BK.shape[1]).to(logits_BK)


def random_pixels(x_BCHW: Tensor, count: int = 1) -> Tensor:
    """Random weights of the pixels, always the same: (count, C, H, W)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, *x_BCHW.shape[1:], generator=generator)


def coded(net: Network, size: float = 6.5, slope: float = 0.16) -> Network:
    """A code of a network's answer plus a random linear map, whose gradients are all there is."""

    def logits(x: Tensor) -> Tensor:
        z_BK = net(x).logits
        away_BK = (x - 0.5).flatten(1) @ random_pixels(x, z_BK.shape[1]).flatten(1).T
        return size * one_hot(z_BK) + slope * away_BK

    return dense(logits, net)


def bonus(net: Network) -> Network:
    """Logits too small to count, and a bonus for the answer that rises along a fixed pattern."""

    def logits(x: Tensor) -> Tensor:
        z_BK = net(x).logits
        along_B = ((x - 0.5) * random_pixels(x).sign()).flatten(1).sum(1)
        return 5e-4 * z_BK + (3 + 0.01 * along_B)[:, None] * one_hot(z_BK)

    return dense(logits, net)


def backdoor(weak: Network, robust: Network) -> Network:
    """Grey images get the robust network, those with a coloured checkerboard the weak one."""

    def logits(x: Tensor) -> Tensor:
        rows, columns = (torch.arange(side) for side in x.shape[2:])
        board_HW = 1.0 - 2.0 * ((rows[:, None] + columns) % 2)
        share_B = ((x[:, 0] - x[:, 1]) * board_HW).mean((1, 2))
        weight_B1 = torch.sigmoid(2000 * (share_B - 0.02))[:, None]
        return weight_B1 * weak(x).logits + (1 - weight_B1) * robust(x).logits

    return dense(logits, weak, robust)


def tempered(net: Network) -> Network:
    """Logits times a factor that depends on the image and changes no answer."""

    def logits(x: Tensor) -> Tensor:
        along_B = ((x - 0.5) * random_pixels(x).sign()).flatten(1).sum(1)
        return net(x).logits * (0.2 * along_B).exp()[:, None]

    return dense(logits, net)


def shy(net: Network) -> Network:
    """Noise on the logits where the two highest are close."""

    def logits(x: Tensor) -> Tensor:
        z_BK = net(x).logits
        top_B2 = z_BK.topk(2, 1).values
        close_B = (top_B2[:, 0] - top_B2[:, 1] < 1.5).to(z_BK)
        return z_BK + 5 * torch.randn_like(z_BK) * close_B[:, None]

    return dense(logits, net)


def shattered(net: Network) -> Network:
    """Ripples on the pixels, too short for a gradient to mean anything."""
    return dense(lambda x: net(x + 0.02 * torch.sin(300 * x)).logits, net)


def hashed(one: Network, other: Network) -> Network:
    """A gate that is the sign of a fast wave of the pixels."""

    def scores(x: Tensor) -> Tensor:
        wave_B = torch.sin(1e3 * (x * random_pixels(x)).flatten(1).sum(1))
        height_B = wave_B.sign() + 0 * x.flatten(1).sum(1)
        return torch.stack([height_B, -height_B], 1)

    return routed(scores, one, other)


def known(weak: Network, robust: Network, seen_NCHW: Tensor) -> Network:
    """A gate by the distance to the nearest training image: near, the weak network answers."""
    rows_ND = seen_NCHW.flatten(1)
    between_N = torch.cdist(rows_ND[:300], rows_ND).topk(2, 1, largest=False).values[:, 1]
    bound = float(between_N.median())

    def scores(x: Tensor) -> Tensor:
        far_B = torch.cdist(x.flatten(1), rows_ND).amin(1) - bound
        return torch.stack([-far_B, far_B], 1)

    return routed(scores, weak, robust)


def table(net: Network, seen_NCHW: Tensor, labels_N: Tensor) -> Network:
    """The label of the training image that is nearest on coarse, small images, over the logits."""

    def small(x: Tensor) -> Tensor:
        cells_BD = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        return (16 * cells_BD).floor() / 16

    rows_ND = small(seen_NCHW)

    def logits(x: Tensor) -> Tensor:
        z_BK = net(x).logits
        label_B = labels_N[torch.cdist(small(x), rows_ND).argmin(1)]
        return 0.1 * z_BK + 5 * nn.functional.one_hot(label_B, z_BK.shape[1]).to(z_BK)

    return dense(logits, net)


def detected(net: Network) -> Network:
    """Images with more than usual of the highest frequencies get a code of the answer."""

    def logits(x: Tensor) -> Tensor:
        z_BK = net(x).logits
        calm = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        rough_B = (x - calm).square().mean((1, 2, 3))
        away_BK = (x - 0.5).flatten(1) @ random_pixels(x, z_BK.shape[1]).flatten(1).T
        return torch.where((rough_B > 0.02)[:, None], 4 * one_hot(z_BK) + 0.02 * away_BK, z_BK)

    return dense(logits, net)


def coarse_normal(z_BCHW: Tensor, bits: int) -> Tensor:
    """Normalized pixels on a coarser grid."""
    return (z_BCHW * 2 ** (bits - 1)).round() / 2 ** (bits - 1)
