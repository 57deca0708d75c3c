"""One expert's pathway of a convolutional mixture as a dense network, and every expert from it.

Komatsuzaki et al., "Sparse Upcycling", ICLR 2023 (arXiv:2212.05055), for the mixture convolutions
of AdvMoE (Zhang et al., ICCV 2023, arXiv:2308.10110).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from moe.layers import MoEConv2d
from moe.network import Network


def pathway(mixture: Network) -> Network:
    """Make the dense network of one expert's path, with the mixture's stem and classifier.

    S-Dense is narrower than this where a mixture keeps the full width of its stem (CIFAR's
    ResNet-18). The first expert's weights are copied; the router and the layers' gates are left
    out. BatchNorm, which all experts share, is the mixture's.

    Raises:
        ValueError: The network has one expert.
    """
    if mixture.num_experts < 2:
        raise ValueError("a pathway is taken from a mixture: num_experts must be at least 2, got 1")
    body = copy.deepcopy(mixture.body)
    for layer in body.modules():
        if isinstance(layer, MoEConv2d):
            first = layer.weight_FCRR.detach().chunk(layer.num_experts)[0].clone()
            layer.weight_FCRR, layer.num_experts, layer.gate = nn.Parameter(first), 1, None
    return Network(body, None, normalize=copy.deepcopy(mixture.normalize), num_experts=1)


@torch.no_grad()
def fill_experts(dense: Network, mixture: Network) -> None:
    """Fill a mixture in place from its trained pathway, so that both are the same function.

    All experts of a layer get the same filters, so no route changes an output: to flip the route
    of an image gains an attacker nothing at first. Router and gates keep their initialization.

    Raises:
        ValueError: A tensor of the pathway has no counterpart of its shape in the mixture.
    """
    own = dict(dense.body.named_parameters()) | dict(dense.body.named_buffers())
    for name, target in (*mixture.body.named_parameters(), *mixture.body.named_buffers()):
        if ".gate." in name:
            continue
        source = own.get(name)
        if source is not None and name.endswith("weight_FCRR"):
            source = source.repeat(mixture.num_experts, 1, 1, 1)
        if source is None or source.shape != target.shape:
            found = "nothing" if source is None else f"shape {tuple(source.shape)}"
            raise ValueError(f"{name} has shape {tuple(target.shape)}, the dense net has {found}")
        target.copy_(source)
