"""Adversarial weight perturbation: the worst weights near those that train.

Shapes: F filters of all the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moe.layers import MoEConv2d
from moe.moe_mlp import MoEMlp

TINY = 1e-12  # keeps the direction of a zero gradient finite: an expert that no image chose

Stack = tuple[nn.Parameter, int]
"""A weight, and how many layers lie in it one after the other: a mixture's experts."""


def stacks(model: nn.Module, members: Collection[nn.Parameter]) -> list[Stack]:
    """List the matrices and filter banks among ``members``; biases and BatchNorm are left out."""
    mine = {id(parameter) for parameter in members}
    return [
        (weight, module.num_experts if isinstance(module, (MoEConv2d, MoEMlp)) else 1)
        for module in model.modules()
        for weight in module.parameters(recurse=False)
        if weight.dim() > 1 and id(weight) in mine
    ]


@contextmanager
def perturbed(layers: Sequence[Stack], slopes: Sequence[Tensor], gamma: float) -> Iterator[None]:
    """Move each layer's weights uphill, ``w + gamma |w| g / |g|``, and back to the bit.

    One step of length gamma from w in the ball ``|v| <= gamma |w|`` of each layer (Wu et al.,
    NeurIPS 2020, arXiv:2004.05884, section 4, whose experiments take one step too). An expert's
    filters are a layer of their own: an image runs along one expert, and should meet the same
    perturbation as in a network of that expert alone.

    Args:
        layers: What moves, see ``stacks``.
        slopes: Gradient of the loss with respect to each.
        gamma: Length over that of the weights; 0.01 for PGD training, 0.005 for TRADES there.
    """
    before = [weight.detach().clone() for weight, _ in layers]
    with torch.no_grad():
        for (weight, count), slope in zip(layers, slopes, strict=True):
            for layer, uphill in zip(weight.chunk(count), slope.chunk(count), strict=True):
                length = gamma * layer.norm() / uphill.norm().clamp(min=TINY)
                layer.add_(length * uphill)
    torch.clear_autocast_cache()  # it holds bf16 copies of the weights as they were
    try:
        yield
    finally:
        for (weight, _), old in zip(layers, before, strict=True):
            weight.detach().copy_(old)
        torch.clear_autocast_cache()


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by the batch as in training, but leave BatchNorm's running statistics alone."""
    moving = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in moving:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in moving:
            norm.track_running_stats = True
