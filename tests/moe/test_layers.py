"""MoEConv2d against the dense sum over experts that defines it.

Shapes: B batch, C channels in, D channels out, E experts, F = E * D filters, R kernel side.
"""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import ConvNorm, MoEConv2d, plain_conv, sorted_conv2d
from moe.routing import Route, Routing

BATCH = 7
ROUTES = {
    "balanced": lambda experts: [b % experts for b in range(BATCH)],
    "skewed": lambda experts: [experts - 1] + [0] * (BATCH - 1),
    "one expert": lambda experts: [experts - 1] * BATCH,
    "ties": lambda _: [None] * BATCH,
}
SHAPES = [(1, 1), (1, 2), (3, 1), (3, 2)]  # kernel, stride


def scores_of(route: str, num_experts: int) -> Tensor:
    """Random scores, (B, E), whose best expert is the given one; equal ones for ties."""
    scores_BE = torch.randn(BATCH, num_experts, dtype=torch.float64)
    for row, best in zip(scores_BE, ROUTES[route](num_experts), strict=True):
        if best is None:
            row[:] = 0.5
        else:
            row[best] = row.max() + 1
    return scores_BE


def dense(layer: MoEConv2d, x_BCHW: Tensor, scores_BE: Tensor) -> Tensor:
    """Run every expert on every image and sum with one-hot gates: slow, and obviously right."""
    one_hot_BE = F.one_hot(scores_BE.argmax(1), layer.num_experts).to(scores_BE)
    gates_BE = one_hot_BE * (1 + scores_BE - scores_BE.detach())
    every_EBDPQ = [
        F.conv2d(x_BCHW, weight_DCRR, stride=layer.stride, padding=layer.padding)
        for weight_DCRR in layer.weight_FCRR.chunk(layer.num_experts)
    ]
    return torch.einsum("ebdpq,be->bdpq", torch.stack(every_EBDPQ), gates_BE)


def exact(found: Tensor | None, want: Tensor | None) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def layer_for(num_experts: int, kernel: int = 3, stride: int = 1, **more: bool) -> MoEConv2d:
    torch.manual_seed(num_experts)
    layer = MoEConv2d(3, 5, kernel, num_experts=num_experts, stride=stride, **more)
    return layer.double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_following_layer_equals_its_dense_definition_with_all_gradients(
    num_experts: int, route: str, kernel: int, stride: int, layout: torch.memory_format
) -> None:
    layer = layer_for(num_experts, kernel, stride).to(memory_format=layout)
    twin = copy.deepcopy(layer)
    start, side = torch.randn(BATCH, 3, 6, 6, dtype=torch.float64), -(-6 // stride)
    x_BCHW = start.clone(memory_format=layout).requires_grad_()
    x_twin = start.clone().requires_grad_()
    scores_BE = scores_of(route, num_experts).requires_grad_()
    scores_twin = scores_BE.detach().clone().requires_grad_()

    way = Route.top1(scores_BE)
    y_BDPQ = layer(x_BCHW[way.order_B], Routing(way))[way.inverse_B]
    want_BDPQ = dense(twin, x_twin, scores_twin)
    exact(y_BDPQ, want_BDPQ)

    grad_BDPQ = torch.randn(BATCH, 5, side, side, dtype=torch.float64)
    y_BDPQ.backward(grad_BDPQ)
    want_BDPQ.backward(grad_BDPQ)
    exact(x_BCHW.grad, x_twin.grad)
    exact(layer.weight_FCRR.grad, twin.weight_FCRR.grad)
    exact(scores_BE.grad, scores_twin.grad)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kernel", "stride"), SHAPES)
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_gated_layer_equals_its_dense_definition_with_all_gradients(
    num_experts: int, kernel: int, stride: int, training: bool
) -> None:
    layer = layer_for(num_experts, kernel, stride, gated=True).train(training)
    twin = copy.deepcopy(layer)
    x_BCHW = torch.randn(BATCH, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    x_twin = x_BCHW.detach().clone().requires_grad_()
    scores_BE, routing = gate(twin, x_twin, training), Routing()
    if layer.gate is None:
        routing.shared = Route.top1(scores_BE)
    y_BDPQ, want_BDPQ = layer(x_BCHW, routing), dense(twin, x_twin, scores_BE)
    exact(y_BDPQ, want_BDPQ)
    if layer.gate:
        exact(routing.scores[0], scores_BE)
        assert torch.equal(routing.chosen[0], scores_BE.argmax(1))

    grad_BDPQ = torch.randn_like(want_BDPQ)
    y_BDPQ.backward(grad_BDPQ)
    want_BDPQ.backward(grad_BDPQ)
    exact(x_BCHW.grad, x_twin.grad)
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        exact(one.grad, other.grad)


def gate(layer: MoEConv2d, x_BCHW: Tensor, training: bool) -> Tensor:
    """A layer's scores as defined: pooled, mapped, normalized by the batch or by the past."""
    if layer.gate is None:
        return x_BCHW.new_zeros(BATCH, 1, requires_grad=True)
    linear, balance = layer.gate.linear, layer.gate.balance
    scores_BE = x_BCHW.mean((2, 3)) @ linear.weight.T + linear.bias
    assert balance.running_mean is not None
    assert balance.running_var is not None
    mean_E, var_E = balance.running_mean, balance.running_var
    if training:
        mean_E, var_E = scores_BE.mean(0), scores_BE.var(0, correction=0)
    return (scores_BE - mean_E) / (var_E + balance.eps).sqrt()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("counts", [(2, 2), (0, 4), (1, 3)])
def test_gradients_agree_with_finite_differences(counts: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    chosen_B = torch.tensor([0] * counts[0] + [1] * counts[1])
    route = Route.fixed(chosen_B, torch.zeros(4, 2))
    x_BCHW = torch.randn(4, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight_FCRR = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias_D = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_bias else None

    def run(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return sorted_conv2d(x, weight, bias[0] if bias else None, route, stride=2, padding=1)

    inputs = (x_BCHW, weight_FCRR) if bias_D is None else (x_BCHW, weight_FCRR, bias_D)
    assert torch.autograd.gradcheck(run, inputs)


def test_idle_expert_gets_a_zero_gradient_and_the_router_a_real_one() -> None:
    layer = layer_for(3)
    scores_BE = torch.tensor([[1.0, 4.0, 2.0]] * BATCH, requires_grad=True)  # all to expert 1
    route = Route.top1(scores_BE)
    layer(torch.rand(BATCH, 3, 6, 6).double(), Routing(route)).square().sum().backward()
    assert layer.weight_FCRR.grad is not None
    assert scores_BE.grad is not None
    idle, used, idle_too = layer.weight_FCRR.grad.chunk(3)
    assert used.any()
    assert not idle.any()
    assert not idle_too.any()
    assert scores_BE.grad[:, 1].all()
    assert not scores_BE.grad[:, [0, 2]].any()


def test_gradient_of_a_folded_layers_bias_is_not_the_gates() -> None:
    """``y = g (W conv x) + b``: the gate does not scale the bias."""
    layer = layer_for(2)
    layer.bias_D = torch.full((5,), 1000.0, dtype=torch.float64)
    scores_BE = scores_of("balanced", 2).requires_grad_()
    twin_BE = scores_BE.detach().clone().requires_grad_()
    x_BCHW, route = torch.randn(BATCH, 3, 6, 6).double(), Route.top1(scores_BE)
    y_BDPQ = layer(x_BCHW[route.order_B], Routing(route))[route.inverse_B]
    want_BDPQ = dense(layer, x_BCHW, twin_BE) + 1000
    exact(y_BDPQ, want_BDPQ)
    grad_BDPQ = torch.randn_like(y_BDPQ)
    y_BDPQ.backward(grad_BDPQ)
    want_BDPQ.backward(grad_BDPQ)
    exact(scores_BE.grad, twin_BE.grad)


def test_autocast_runs_the_layer_in_bf16_as_it_does_a_plain_convolution() -> None:
    layer = layer_for(2).float()
    x_BCHW, route = torch.randn(BATCH, 3, 6, 6), Route.top1(scores_of("skewed", 2).float())
    want_BDPQ = layer(x_BCHW, Routing(route))
    with torch.autocast("cpu", torch.bfloat16):
        y_BDPQ = layer(x_BCHW, Routing(route))
    assert y_BDPQ.dtype == torch.bfloat16
    torch.testing.assert_close(y_BDPQ.float(), want_BDPQ, rtol=0.05, atol=0.05)


def test_experts_start_apart_and_each_with_the_deviation_of_its_own_fan() -> None:
    torch.manual_seed(0)
    layer = MoEConv2d(64, 128, 3, num_experts=4)
    experts = layer.weight_FCRR.detach().chunk(4)
    for weight_DCRR in experts:
        assert float(weight_DCRR.std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not any(torch.equal(one, other) for one, other in pairwise(experts))


def test_one_expert_is_a_plain_convolution_with_batchnorm() -> None:
    torch.manual_seed(0)
    mixture = ConvNorm(MoEConv2d(3, 5, 3, num_experts=1, stride=2), 5)
    plain = ConvNorm(plain_conv(3, 5, 3, 2), 5)
    assert isinstance(mixture.conv, MoEConv2d)
    assert isinstance(plain.conv, nn.Conv2d)
    plain.conv.weight.data.copy_(mixture.conv.weight_FCRR)
    x_BCHW = torch.rand(4, 3, 6, 6)
    route = Route.fixed(torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1))
    torch.testing.assert_close(mixture(x_BCHW, Routing(route)), plain(x_BCHW, Routing()))


@pytest.mark.parametrize("channels", [4, 8, 15, 16])
@pytest.mark.parametrize("kind", ["mixture", "plain"])
def test_thin_strided_1x1_convolution_has_its_gradients_where_channels_come_last(
    kind: str, channels: int
) -> None:
    """In fp32 on 56 px, where oneDNN's own weight gradient writes past its buffer."""
    torch.manual_seed(0)
    layer = plain_conv(channels, 16, 1, 2)
    mixture = MoEConv2d(channels, 16, 1, num_experts=1, stride=2)
    mixture.weight_FCRR.data.copy_(layer.weight.data)
    x_BCHW, grad_BDPQ = torch.randn(2, channels, 56, 56), torch.randn(2, 16, 28, 28)
    want_BDPQ = torch.einsum("bcpq,dc->bdpq", x_BCHW[:, :, ::2, ::2], layer.weight[:, :, 0, 0])
    want_DC = torch.einsum("bcpq,bdpq->dc", x_BCHW[:, :, ::2, ::2], grad_BDPQ)

    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last).requires_grad_()
    if kind == "mixture":
        weight, route = mixture.weight_FCRR, Route.top1(torch.zeros(2, 1))
        y_BDPQ = mixture(x_BCHW, Routing(route))
    else:
        weight, y_BDPQ = layer.weight, layer(x_BCHW)
    y_BDPQ.backward(grad_BDPQ.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y_BDPQ, want_BDPQ, rtol=1e-4, atol=1e-4)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, :, 0, 0], want_DC, rtol=1e-3, atol=1e-3)
    assert x_BCHW.grad is not None
    assert not x_BCHW.grad[:, :, 1::2, 1::2].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 2, "out_channels": 0}, "out_channels must be at least 1, got 0"),
    ],
)
def test_layer_rejects_sizes_below_one(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConv2d(**{"in_channels": 3, "out_channels": 4, **settings})


def test_layer_rejects_a_route_of_another_batch_or_another_number_of_experts() -> None:
    layer, x_BCHW = layer_for(2), torch.rand(5, 3, 6, 6).double()
    for batch, experts in ((4, 2), (5, 3)):
        route = Route.top1(torch.rand(batch, experts))
        message = f"route shares {batch} images among {experts} experts, want 5 among 2"
        with pytest.raises(ValueError, match=message):
            layer(x_BCHW, Routing(route))
