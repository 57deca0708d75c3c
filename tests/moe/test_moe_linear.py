"""MoELinear against the dense sum over experts that defines it, and an MLP whose layers are mixed.

Shapes: B images, T positions, C features in, D out, E experts.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.cost import cost
from moe.fold_batchnorm import fold
from moe.layers import MoELinear
from moe.network import Network
from moe.normalize import Normalize
from moe.routers import ImageRouter
from moe.routing import Route, Routing
from pipeline.bench.masked import masked

BATCH, POSITIONS = 7, 5


def exact(found: Tensor | None, want: Tensor | None) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def definition(layer: MoELinear, x_BTC: Tensor, scores_BE: Tensor) -> Tensor:
    """Run every expert on every image and sum with one-hot gates."""
    chosen_BE = F.one_hot(scores_BE.argmax(1), scores_BE.shape[1]).to(scores_BE)
    gates_BE = chosen_BE * (1 + scores_BE - scores_BE.detach())
    weight_EDC = layer.conv.weight_FCRR.squeeze((2, 3)).unflatten(0, (scores_BE.shape[1], -1))
    return torch.einsum("btc,edc,be->btd", x_BTC, weight_EDC, gates_BE) + layer.bias_D


@pytest.mark.parametrize("gated", [False, True], ids=["follows", "routes"])
@pytest.mark.parametrize("shape", [(BATCH, 6), (BATCH, POSITIONS, 6)], ids=["BC", "BTC"])
@pytest.mark.parametrize("experts", [2, 4])
def test_linear_mixture_equals_its_definition_with_all_gradients(
    experts: int, shape: tuple[int, ...], gated: bool
) -> None:
    torch.manual_seed(experts)
    layer = MoELinear(6, 3, num_experts=experts, gated=gated).double()
    nn.init.normal_(layer.bias_D)
    twin = copy.deepcopy(layer)
    x, x_twin = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x_twin.copy_(x)
    x.requires_grad_()
    x_twin.requires_grad_()
    rows_BTC = x_twin.reshape(BATCH, -1, 6)
    scores = torch.randn(BATCH, experts, dtype=torch.float64)
    scores_BE, scores_twin = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    if gated:
        routing = Routing()
        found = layer(x, routing)
        assert twin.conv.gate is not None
        scores_twin = twin.conv.gate(rows_BTC.transpose(1, 2)[..., None])
        exact(routing.scores[0], scores_twin)
    else:
        route = Route.top1(scores_BE)
        found = layer(x[route.order_B], Routing(route))[route.inverse_B]
    want = definition(twin, rows_BTC, scores_twin).reshape(*shape[:-1], 3)
    exact(found, want)
    push = torch.randn(found.shape, dtype=torch.float64)
    found.mul(push).sum().backward()
    want.mul(push).sum().backward()
    exact(x.grad, x_twin.grad)
    for (name, own), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if name != "conv.gate.linear.bias":  # normalized scores leave mere rounding there
            exact(own.grad, other.grad)
    if not gated:
        exact(scores_BE.grad, scores_twin.grad)


class MLP(nn.Module):
    """Two mixed linear layers on flattened images."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.first = MoELinear(3 * 8 * 8, 12, num_experts=2, gated=gated)
        self.second = MoELinear(12, 4, num_experts=2, gated=gated)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        found: Tensor = self.second(self.first(x_BCHW.flatten(1), routing).relu(), routing)
        return found


@pytest.mark.parametrize("gated", [False, True], ids=["one route", "per layer"])
def test_an_mlp_is_mixed_in_its_layers(gated: bool) -> None:
    """It routes, folds, has its masked twin's numbers, and costs what it computes."""
    torch.manual_seed(0)
    router = None if gated else ImageRouter(2, blocks=1, widths=(4,), max_side=8)
    net = Network(
        MLP(gated),
        router,
        normalize=Normalize(),
        num_experts=2,
        num_layers=2 if gated else 0,
    )
    net = net.double().eval()
    x_BCHW = torch.rand(16, 3, 8, 8, dtype=torch.float64)
    found, want = net(x_BCHW), masked(net)(x_BCHW)
    assert torch.equal(found.route, want.route)
    exact(found.logits, want.logits)
    exact(fold(net)(x_BCHW).logits, found.logits)
    counted = cost(net.float(), 8)
    assert round(1e9 * (counted.gmac - counted.gmac_router)) == 3 * 8 * 8 * 12 + 12 * 4
