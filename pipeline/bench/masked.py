"""Mixture networks the slow way, every expert on every image: what the fast ones are held to.

Shapes: B images, C channels in, D channels out, E experts, L mixture layers, HW and PQ image sides.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import MoEConv2d, pixels_read
from moe.mixture_of_networks import Mixture
from moe.network import Network
from moe.routing import Routed, Routing, straight_through_top1


@dataclass
class _Masks(Routing):
    """A routing that carries one-hot gates (B, E) for the whole network in place of a route."""

    gates_BE: Tensor | None = None


class MaskedConv2d(nn.Module):
    """``y_b = sum_e g_be (W_e conv x_b)`` with one-hot straight-through gates, computed as written.

    The mixture layer of AdvMoE's released code (Zhang et al., ICCV 2023, arXiv:2308.10110): E times
    the multiplications of ``MoEConv2d`` for the same numbers. Shares that layer's parameters.
    """

    def __init__(self, layer: MoEConv2d):
        super().__init__()
        assert layer.bias_D is None, "a folded layer has no masked twin"
        self.num_experts, self.stride, self.padding = layer.num_experts, layer.stride, layer.padding
        self.weight_FCRR, self.gate = layer.weight_FCRR, layer.gate

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        """Map features (B, C, H, W) to (B, D, P, Q)."""
        gates_BE = self._gates(x_BCHW, routing)
        x_BCHW, stride = pixels_read(x_BCHW, self.weight_FCRR, self.stride)
        y_BFPQ = F.conv2d(x_BCHW, self.weight_FCRR, None, stride, self.padding)
        y_BEDPQ = y_BFPQ.view(len(y_BFPQ), self.num_experts, -1, *y_BFPQ.shape[2:])
        return (y_BEDPQ * gates_BE[:, :, None, None, None]).sum(1)

    def _gates(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        if self.gate is None:
            assert isinstance(routing, _Masks)
            assert routing.gates_BE is not None
            return routing.gates_BE
        layer, scores_BE = len(routing.scores), self.gate(x_BCHW)
        routing.scores.append(scores_BE)
        if routing.fixed_BL is not None:
            routing.chosen.append(routing.fixed_BL[:, layer])
            return one_hot(routing.chosen[-1], scores_BE)
        routing.chosen.append(scores_BE.argmax(1))
        return straight_through_top1(scores_BE if routing.gate_gradient else scores_BE.detach())


class MaskedNetwork(Network):
    """A network of ``MaskedConv2d``: the same calls, without sorting, pieces or folding."""

    def forward(self, x_BCHW: Tensor) -> Routed:
        """Classify pixels in [0, 1]."""
        if self.num_layers:
            return super().forward(x_BCHW)
        x_BCHW = self.normalize(x_BCHW)
        scores_BE = self.scores(x_BCHW)
        gates_BE = straight_through_top1(scores_BE if self.gate_gradient else scores_BE.detach())
        return Routed(self.body(x_BCHW, _Masks(gates_BE=gates_BE)), scores_BE, scores_BE.argmax(1))

    def along(self, x_BCHW: Tensor, route: Tensor) -> Tensor:
        """Classify along a given route, (B,) or (B, L); return logits (B, K)."""
        if self.num_layers:
            return super().along(x_BCHW, route)
        gates_BE = one_hot(route, x_BCHW.new_zeros(len(x_BCHW), self.num_experts))
        logits_BK: Tensor = self.body(self.normalize(x_BCHW), _Masks(gates_BE=gates_BE))
        return logits_BK


def masked(model: Network) -> MaskedNetwork:
    """Copy a network, weights and all, into one that computes every expert on every image.

    Raises:
        ValueError: Its experts are whole networks, not parts of layers.
    """
    if isinstance(model, Mixture):
        raise ValueError("whole networks as experts have no masked form: backbone=mixture")
    model = copy.deepcopy(model)
    _mask_layers(model.body)
    twin = MaskedNetwork(
        model.body,
        model.router,
        normalize=model.normalize,
        num_experts=model.num_experts,
        num_layers=model.num_layers,
    )
    twin.training, twin.gate_gradient = model.training, model.gate_gradient
    return twin


def one_hot(route_B: Tensor, scores_BE: Tensor) -> Tensor:
    """Write a route as gates (B, E) of the scores' type."""
    return torch.zeros_like(scores_BE).scatter(1, route_B[:, None], 1.0)


def _mask_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, MoEConv2d):
            setattr(module, name, MaskedConv2d(child))
        else:
            _mask_layers(child)
