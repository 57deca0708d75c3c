"""Traceable forms of a model for ``torch.export``: one graph, or a router and its pathways.

Shapes: B images, C channels in, D channels out, E experts, R kernel side, HW and PQ image sides,
K classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.dual_model import Dual, blend
from moe.fold_batchnorm import fold
from moe.layers import ConvNorm, MoEConv2d
from moe.mixture_of_networks import Mixture, mixed
from moe.moe_mlp import MoEMlp
from moe.network import Network
from moe.routing import best
from moe.token_network import TokenNetwork


def exportable(model: Network) -> nn.Module:
    """Copy a model as a module that maps pixels (B, 3, H, W) in [0, 1] to logits (B, K) alone.

    Sorting a batch by expert asks the host how many images each expert has, which no traced graph
    can. Here every mixture convolution gathers the filters of each image's expert and runs them
    as one convolution of B groups: the same hard routing and the same multiply-accumulates, in a
    graph whose batch size stays free. It holds B sets of filters at a time, so it is meant for
    single images and small batches; ``moe.fold_batchnorm.fold`` is the copy for large ones.

    Of whole networks as experts each runs on every image, and those that take part are mixed: E
    times the work, of which ``top_k`` are wanted. So do the experts of a transformer's mixture
    layers on every token.

    Raises:
        ValueError: The images of a batch share the experts' capacity: that is no function of one.

    The copy is in eval mode, BatchNorm folded, and shares no storage with the model.
    """
    return LogitsOf(_traceable(copy.deepcopy(fold(model)))).eval()


def exportable_with_route(model: Network) -> nn.Module:
    """Copy a model as ``exportable`` does, to a module that returns logits (B, K) and the route.

    Raises:
        ValueError: Tokens and not images are routed.
    """
    _refuse_token_routes(model)
    return _traceable(copy.deepcopy(fold(model))).eval()


def exportable_parts(model: Network) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Split a model into routers and pathways, and say how they make up the whole again.

    Each part maps pixels (B, 3, H, W) to scores (B, E) or logits (B, K) and holds plain
    convolutions only, so that a large batch that is sorted by expert costs what one pathway costs
    per image. ``moe.exported_model.ExportedModel`` puts the parts together.

    Returns:
        The parts by name, and a tree of JSON values whose leaves are these names.

    Raises:
        ValueError: Every layer routes for itself, or tokens are routed: no image has one pathway.
    """
    parts: dict[str, nn.Module] = {}
    tree = _split(copy.deepcopy(fold(model)), "", parts)
    return {name: part.eval() for name, part in parts.items()}, tree


def _refuse_token_routes(model: Network) -> None:
    if isinstance(model, TokenNetwork):
        raise ValueError("tokens are routed, not images: there is no route per image to export")


def _split(folded: Network, prefix: str, parts: dict[str, nn.Module]) -> dict[str, Any]:
    if isinstance(folded, Dual):
        halves = {"standard": folded.standard, "robust": folded.robust}
        trees = {name: _split(half, f"{prefix}{name}_", parts) for name, half in halves.items()}
        return {"kind": "dual", "alpha": folded.alpha, "mix": folded.mix, **trees}
    _refuse_token_routes(folded)
    if folded.num_layers:
        raise ValueError("every layer routes for itself: an image has no single pathway")
    tree: dict[str, Any] = {"kind": "network", "router": None}
    if folded.router is not None:
        tree["router"] = f"{prefix}router"
        parts[tree["router"]] = nn.Sequential(copy.deepcopy(folded.normalize), folded.router)
    pathways: list[nn.Module]
    if isinstance(folded, Mixture):
        pathways = [LogitsOf(_traceable(expert)) for expert in folded.experts]
        settings = {"gate": folded.gate, "mix": folded.mix, "top_k": folded.top_k}
        tree |= {"kind": "mixture", **settings}
    else:
        pathways = [_Pathway(folded, expert) for expert in range(folded.num_experts)]
    names = [f"{prefix}expert_{expert}" for expert in range(len(pathways))]
    parts.update(zip(names, pathways, strict=True))
    return {**tree, "experts": names}


def _traceable(folded: Network) -> nn.Module:
    if isinstance(folded, Dual):
        return _DualClassifier(folded)
    if isinstance(folded, Mixture):
        return _MixtureClassifier(folded)
    if isinstance(folded, TokenNetwork) and folded.couples:
        raise ValueError("capacity must be 0 for export, or an answer depends on the batch")
    return _Classifier(folded, _gathered(folded.body))


@dataclass
class _Choice:
    """Takes the place of the ``Routing`` that the layers of a ``Network`` hand on.

    Attributes:
        shared_B: Expert of each image, or None where every layer chooses or there is one expert.
        layers: Choices (B,) of the layers that routed for themselves so far.
    """

    shared_B: Tensor | None = None
    layers: list[Tensor] = field(default_factory=list)


class LogitsOf(nn.Module):
    """The logits of a classifier that returns the route too."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.classifier(x_BCHW)[0]
        return logits_BK


class _Pathway(nn.Module):
    """Normalize and classify by one expert of every mixture layer."""

    def __init__(self, folded: Network, expert: int):
        super().__init__()
        self.normalize = copy.deepcopy(folded.normalize)
        self.body = _gathered(copy.deepcopy(folded.body), expert)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.body(self.normalize(x_BCHW), _Choice())
        return logits_BK


class _DualClassifier(nn.Module):
    """Classify by both networks of a dual model, and mix."""

    def __init__(self, folded: Dual):
        super().__init__()
        self.standard, self.robust = _traceable(folded.standard), _traceable(folded.robust)
        self.alpha, self.mix = folded.alpha, folded.mix
        self.robust_experts = folded.robust.num_experts

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        standard_BK, standard_B = self.standard(x_BCHW)
        robust_BK, robust_B = self.robust(x_BCHW)
        logits_BK = blend(standard_BK, robust_BK, self.alpha, self.mix)
        return logits_BK, standard_B * self.robust_experts + robust_B


class _Classifier(nn.Module):
    """Normalize, choose each image's expert where one route serves the network, classify."""

    def __init__(self, folded: Network, body: nn.Module):
        super().__init__()
        self.normalize, self.router, self.body = folded.normalize, folded.router, body

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        x_BCHW = self.normalize(x_BCHW)
        choice = _Choice(None if self.router is None else self.router(x_BCHW).argmax(1))
        logits_BK: Tensor = self.body(x_BCHW, choice)
        if choice.layers:
            return logits_BK, torch.stack(choice.layers, 1)
        if choice.shared_B is None:
            return logits_BK, logits_BK.argmax(1) * 0  # a dense net's only expert
        return logits_BK, choice.shared_B


class _MixtureClassifier(nn.Module):
    """Classify by every expert, and mix those that the router chose."""

    def __init__(self, folded: Network):
        super().__init__()
        assert isinstance(folded, Mixture)
        self.normalize, self.router = folded.normalize, folded.router
        self.experts = nn.ModuleList(_traceable(expert) for expert in folded.experts)
        self.gate, self.mix, self.top_k = folded.gate, folded.mix, folded.top_k

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        assert self.router is not None
        scores_BE = self.router(self.normalize(x_BCHW))
        every_BEK = torch.stack([expert(x_BCHW)[0] for expert in self.experts], 1)
        chosen_BC = best(scores_BE, self.top_k)
        classes = every_BEK.shape[2]
        logits_BCK = every_BEK.gather(1, chosen_BC[:, :, None].expand(-1, -1, classes))
        mixed_BK = mixed(scores_BE.gather(1, chosen_BC), logits_BCK, self.gate, self.mix)
        return mixed_BK, chosen_BC[:, 0]


class _GatheredConv(nn.Module):
    """A folded mixture convolution that runs each image's expert in a group of its own.

    Args:
        expert: Keep this one alone, for every image.
    """

    def __init__(self, conv: MoEConv2d, expert: int | None = None):
        super().__init__()
        self.stride, self.padding, self.gate = conv.stride, conv.padding, conv.gate
        filters = conv.weight_FCRR.shape[1:]
        weight_EDCRR = conv.weight_FCRR.view(conv.num_experts, -1, *filters)
        if expert is not None:
            weight_EDCRR = weight_EDCRR[expert : expert + 1].clone()
        self.register_buffer("weight_EDCRR", weight_EDCRR.contiguous())
        self.register_buffer("bias_D", conv.bias_D)
        self.weight_EDCRR: Tensor
        self.bias_D: Tensor | None  # none where no BatchNorm followed

    def forward(self, x_BCHW: Tensor, choice: _Choice) -> Tensor:
        if len(self.weight_EDCRR) == 1:
            return F.conv2d(x_BCHW, self.weight_EDCRR[0], self.bias_D, self.stride, self.padding)
        chosen_B = choice.shared_B
        if self.gate is not None:
            chosen_B = self.gate(x_BCHW).argmax(1)
            choice.layers.append(chosen_B)
        images, _, height, width = x_BCHW.shape  # len(x_BCHW) would fix the traced batch size
        y_1FPQ = F.conv2d(
            x_BCHW.reshape(1, -1, height, width),
            self.weight_EDCRR[chosen_B].flatten(0, 1),
            None,
            self.stride,
            self.padding,
            groups=images,
        )
        y_BDPQ = y_1FPQ.view(images, -1, *y_1FPQ.shape[2:])
        return y_BDPQ if self.bias_D is None else y_BDPQ + self.bias_D.view(1, -1, 1, 1)


class _EveryMlp(nn.Module):
    """A mixture of MLPs that runs every expert on every token, and weighs those that it chose."""

    def __init__(self, layer: MoEMlp):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor, _: object) -> Tensor:
        layer, (up_EHD, up_EH, down_EDH, down_ED) = self.layer, self.layer.stacks
        scores_BTS = layer.router(x_BTD)
        if layer.settings.router == "soft":
            route = layer.slot_route(scores_BTS)
            slots_BSD = route.dispatch_BTS.transpose(1, 2) @ x_BTD
            z_BESD = torch.unflatten(slots_BSD, 1, (layer.num_experts, -1))
            h_BESH = torch.einsum("besd,ehd->besh", z_BESD, up_EHD) + up_EH[:, None]
            y_BESD = torch.einsum("besh,edh->besd", F.gelu(h_BESH), down_EDH) + down_ED[:, None]
            return route.combine_BTS @ y_BESD.flatten(1, 2)
        weights_BTE = torch.unflatten(layer.weights(scores_BTS), 0, x_BTD.shape[:2])
        h_BTEH = torch.einsum("btd,ehd->bteh", x_BTD, up_EHD) + up_EH
        y_BTED = torch.einsum("bteh,edh->bted", F.gelu(h_BTEH), down_EDH) + down_ED
        return torch.einsum("bte,bted->btd", weights_BTE, y_BTED)


def _gathered(module: nn.Module, expert: int | None = None) -> nn.Module:
    """Replace the mixture convolutions of a folded body, in place; return what replaces it."""
    if isinstance(module, ConvNorm) and isinstance(module.conv, MoEConv2d):
        return _GatheredConv(module.conv, expert)
    if isinstance(module, MoEConv2d):
        return _GatheredConv(module, expert)
    if isinstance(module, MoEMlp):
        return _EveryMlp(module)
    for name, child in module.named_children():
        setattr(module, name, _gathered(child, expert))
    return module
