"""What a model costs: multiply-accumulates of one image, parameters, the router's share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe.dual_model import Dual
from moe.network import Network, is_router_parameter
from moe.token_network import TokenNetwork


@dataclass(frozen=True)
class Cost:
    """Cost of classifying one image, router included.

    Attributes:
        gmac: 10^9 multiply-accumulates along one route.
        gmac_router: Those of the router (zero for a dense net).
        params: Parameters of all experts and the router.
        params_router: Those of the router.
    """

    gmac: float
    gmac_router: float
    params: int
    params_router: int


def cost(model: Network, image_size: int) -> Cost:
    """Measure a network by running one blank image under torch's FLOP counter.

    Convolutions and linear maps count; BatchNorm, activations and pooling, below 1% of a CNN, do
    not, as in the papers' tables. A mixture layer runs the chosen experts alone, of a transformer
    those of each token, so what is counted is what is computed. A network on the meta device is
    counted without memory or arithmetic:
    ``with torch.device("meta"): cost(backbone.build(10, 32), 32)``.
    """
    was_training, device = model.training, next(model.parameters()).device
    blank = torch.zeros(1, 3, image_size, image_size, device=device)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(blank)
    model.train(was_training)
    names = [(name, p.numel()) for name, p in model.named_parameters()]
    return Cost(
        gmac=whole.get_total_flops() / 2e9,
        gmac_router=_router_flops(model, blank) / 2e9,
        params=sum(size for _, size in names),
        params_router=sum(size for name, size in names if is_router_parameter(name)),
    )


def _router_flops(model: Network, blank: torch.Tensor) -> int:
    if isinstance(model, Dual):
        return _router_flops(model.standard, blank) + _router_flops(model.robust, blank)
    if isinstance(model, TokenNetwork):
        return sum(2 * model.tokens * m.router.weight_SD.numel() for m in model.mixtures.values())
    gates = [m for name, m in model.named_modules() if name.endswith(".gate.linear")]
    if model.router is None:
        return sum(2 * m.weight.numel() for m in gates if isinstance(m, nn.Linear))
    was_training = model.router.training
    model.router.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.router(blank)
    model.router.train(was_training)
    return int(counter.get_total_flops())
