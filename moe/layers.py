"""Mixture layers by sorted dispatch: each image runs one expert, and only that one is computed.

Shapes: B batch (sorted by expert), C channels in, D channels out, E experts, R kernel side, HW and
PQ image sides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.routing import Route, Routing, at_least_float32


class _SortedConv(torch.autograd.Function):
    """One convolution for each expert's slice of the batch.

    Saves its input alone. The gate's gradient ``<grad, W_e conv x_b>`` equals
    ``<W_e^T conv grad, x_b>`` since the convolution is linear, so no second copy of the output is
    kept; gates are ones, so the forward pass never multiplies by them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        weight_FCRR: Tensor,
        bias_D: Tensor | None,
        gate_B: Tensor,
        counts: list[int],
        stride: int,
        padding: int,
    ) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_FCRR)
        ctx.settings = (counts, stride, padding)
        parts = [
            F.conv2d(x, weight, bias_D, stride, padding)
            for x, weight in zip(
                torch.split(x_BCHW, counts), weight_FCRR.chunk(len(counts)), strict=True
            )
            if len(x)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_FCRR = ctx.saved_tensors
        counts, stride, padding = ctx.settings
        wants_x, wants_weight, wants_bias, wants_gate = ctx.needs_input_grad[:4]
        grad_BDPQ = grads[0]
        grad_x, grad_weight = [], []
        experts = zip(
            torch.split(x_BCHW, counts),
            weight_FCRR.chunk(len(counts)),
            torch.split(grad_BDPQ, counts),
            strict=True,
        )
        for x, weight, grad in experts:
            if len(x):
                mask = [wants_x or wants_gate, wants_weight, False]
                to_x, to_weight, _ = torch.ops.aten.convolution_backward(
                    grad,
                    x,
                    weight,
                    None,
                    [stride] * 2,
                    [padding] * 2,
                    [1, 1],
                    False,
                    [0, 0],
                    1,
                    mask,
                )
                grad_x.append(to_x)
                grad_weight.append(to_weight)
            else:  # zero, not None, so that the replicas of a distributed run stay in step
                grad_weight.append(torch.zeros_like(weight) if wants_weight else None)
        all_x = torch.cat(grad_x) if len(grad_x) > 1 else grad_x[0]
        return (
            all_x if wants_x else None,
            torch.cat(grad_weight) if wants_weight else None,
            grad_BDPQ.sum((0, 2, 3)) if wants_bias else None,
            (all_x * x_BCHW).sum((1, 2, 3)) if wants_gate else None,
            None,
            None,
            None,
        )


def sorted_conv2d(
    x_BCHW: Tensor,
    weight_FCRR: Tensor,
    bias_D: Tensor | None,
    route: Route,
    *,
    stride: int,
    padding: int,
) -> Tensor:
    """Convolve images in sorted order, each with the filters of its expert.

    ``y_b = g_b (W_e(b) conv x_b) + bias`` with gates of one; ``weight_FCRR`` stacks the experts,
    F = E * D. Follows autocast like ``torch.nn.functional.conv2d``.
    """
    device, settings = x_BCHW.device.type, {"stride": stride, "padding": padding}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_BCHW, weight_FCRR = x_BCHW.to(dtype), weight_FCRR.to(dtype)
        bias_D = bias_D if bias_D is None else bias_D.to(dtype)
        with torch.autocast(device, enabled=False):
            return sorted_conv2d(x_BCHW, weight_FCRR, bias_D, route, **settings)
    x_BCHW, stride = pixels_read(x_BCHW, weight_FCRR, stride)
    y: Tensor = _SortedConv.apply(  # type: ignore[no-untyped-call]
        x_BCHW, weight_FCRR, bias_D, route.gate_B, list(route.counts), stride, padding
    )
    return y


def pixels_read(x_BCHW: Tensor, weight_DCRR: Tensor, stride: int) -> tuple[Tensor, int]:
    """Leave out the pixels that a thin 1x1 convolution strides over; return the stride left.

    The same numbers. With fewer input channels than oneDNN takes at a time (16 with AVX-512) its
    weight gradient of a strided 1x1 convolution writes past its buffer where channels come last
    (uxlfoundation/oneDNN issue 6035): 8 channels on 56 px crashed torch 2.15 on a CPU.
    """
    if stride > 1 and weight_DCRR.shape[2] == 1 and weight_DCRR.shape[1] < 16:
        return x_BCHW[:, :, ::stride, ::stride], 1
    return x_BCHW, stride


class PlainConv(nn.Conv2d):
    """A convolution that every image shares, see ``plain_conv``."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW, stride = pixels_read(x_BCHW, self.weight, self.stride[0])
        return F.conv2d(x_BCHW, self.weight, self.bias, stride, self.padding[0])


class LinearGate(nn.Module):
    """Scores (B, E) of one layer's experts from its own input: average pooling, one linear map.

    Normalized over the batch for the reason given in ``moe.routers.ImageRouter``.
    """

    def __init__(self, channels: int, num_experts: int):
        super().__init__()
        self.linear = nn.Linear(channels, num_experts)
        self.balance = nn.BatchNorm1d(num_experts, affine=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scores_BE: Tensor = self.balance(at_least_float32(self.linear(x_BCHW.mean((2, 3)))))
        return scores_BE


class MoEConv2d(nn.Module):
    """Convolution that runs one expert's filters per image.

    ``y_b = g_be (W_e conv x_b)``, ``e = argmax scores_b``: the pathway selection of AdvMoE (Zhang
    et al., ICCV 2023, arXiv:2308.10110). Experts that no image chose cost nothing, and get a zero
    gradient rather than None.

    Args:
        in_channels, out_channels: Of one expert.
        kernel, stride: Sides; the padding is ``kernel // 2``.
        num_experts: E. With 1 this is a plain convolution.
        gated: The layer routes for itself (``router_scope="per_layer"``); otherwise it follows
            the route of the whole network and expects images in that route's order.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        num_experts: int,
        stride: int = 1,
        gated: bool = False,
    ):
        super().__init__()
        for name, size in (("num_experts", num_experts), ("out_channels", out_channels)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.num_experts, self.stride, self.padding = num_experts, stride, kernel // 2
        shape = (num_experts * out_channels, in_channels, kernel, kernel)
        self.weight_FCRR = nn.Parameter(torch.empty(shape))
        self.bias_D: Tensor | None = None  # only a folded layer has one, see moe.fold_batchnorm
        self.gate = LinearGate(in_channels, num_experts) if gated and num_experts > 1 else None
        for weight_DCRR in self.weight_FCRR.detach().chunk(num_experts):
            nn.init.kaiming_normal_(weight_DCRR, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        """Map features (B, C, H, W) to (B, D, P, Q), in the order in which they came."""
        if self.gate is None:
            assert routing.shared is not None, "a layer without a gate needs the network's route"
            return self.convolve(x_BCHW, routing.shared)
        route = routing.decide(self.gate(x_BCHW))
        return self.convolve(x_BCHW[route.order_B], route)[route.inverse_B]

    def convolve(self, x_BCHW: Tensor, route: Route) -> Tensor:
        """Run each expert on its slice of images that are in the order of ``route``."""
        if len(route.counts) != self.num_experts or sum(route.counts) != len(x_BCHW):
            raise ValueError(
                f"route shares {sum(route.counts)} images among {len(route.counts)} experts, "
                f"want {len(x_BCHW)} among {self.num_experts}"
            )
        return sorted_conv2d(
            x_BCHW,
            self.weight_FCRR,
            self.bias_D,
            route,
            stride=self.stride,
            padding=self.padding,
        )


class MoELinear(nn.Module):
    """Linear map with one expert's weights per image, for an MLP or the layers of a transformer.

    ``y_bt = g_be (W_e x_bt) + bias``, ``e = argmax scores_b``; all experts share the bias. It is
    ``MoEConv2d`` with a kernel of 1 over positions laid out as pixels, so that folding and costs
    know it. A layer whose tokens choose for themselves is
    ``moe.moe_mlp.MoEMlp``.

    Args:
        in_features, out_features: Of one expert.
        num_experts: E.
        gated: The layer routes for itself, by the mean over positions, as in ``MoEConv2d``.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_experts: int, gated: bool = False
    ):
        super().__init__()
        self.conv = MoEConv2d(in_features, out_features, 1, num_experts=num_experts, gated=gated)
        self.bias_D = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Map features (B, C), or (B, T, C) at T positions, to D in place of C."""
        x_BCT1 = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)[..., None]
        y_BTD = self.conv(x_BCT1, routing).squeeze(3).transpose(1, 2) + self.bias_D
        found: Tensor = y_BTD.reshape(*x.shape[:-1], -1)
        return found


class ConvNorm(nn.Module):
    """A convolution, plain or mixture, with its BatchNorm; all experts share the BatchNorm."""

    def __init__(self, conv: nn.Module, channels: int):
        super().__init__()
        self.conv = conv
        self.norm: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        plain = isinstance(self.conv, nn.Conv2d)
        y_BDPQ = self.conv(x_BCHW) if plain else self.conv(x_BCHW, routing)
        normed_BDPQ: Tensor = self.norm(y_BDPQ)
        return normed_BDPQ


def plain_conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Make a convolution that every image shares, without bias, padded by ``kernel // 2``."""
    conv = PlainConv(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
