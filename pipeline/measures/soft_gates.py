"""Copies of a mixture whose gates pass gradients that the deployed network's do not.

Each is differentiable where the deployed network jumps, for an attacker to climb; what it finds is
judged on the deployed network.

Shapes: B images, E experts, K classes, D channels, PQ sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import MoEConv2d
from moe.network import Network
from moe.routing import Routing
from moe.token_network import TokenNetwork
from pipeline.attacks import Walker
from pipeline.attacks.apgd import like
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, untouched
from pipeline.optimization.losses import margin_per_image

M = TypeVar("M", bound=nn.Module)
Gate = Callable[[Tensor], Tensor]  # scores (B, E) to the weights of the experts (B, E)


def soft_backward(scores_BE: Tensor) -> Tensor:
    """One-hot gates of the chosen expert, with the gradient of a softmax over all experts."""
    soft_BE = scores_BE.softmax(1)
    hard_BE = torch.zeros_like(soft_BE).scatter(1, scores_BE.argmax(1, keepdim=True), 1.0)
    return hard_BE + soft_BE - soft_BE.detach()


def soft_at(temperature: float) -> Gate:
    """Make gates ``softmax(scores / temperature)``: every expert has its say."""
    return lambda scores_BE: (scores_BE / temperature).softmax(1)


def straight_through(model: Network) -> Callable[[Tensor], Tensor]:
    """Return the logits of the network with the gate gradient of its training.

    The chosen expert alone passes it on, see ``moe.routing.straight_through_top1``.
    """
    twin = _same(model)
    twin.gate_gradient = True  # of a dual model, of both halves
    return lambda x_BCHW: twin(x_BCHW).logits


def relaxed(model: Network, gate: Gate) -> Callable[[Tensor], Tensor]:
    """Return logits in which all experts take part, weighted by gates of the router's scores.

    With one router ``sum_e g_e z_e``, over the logits ``z_e`` of the experts' whole pathways; with
    ``per_layer`` routers the sum is over the experts' feature maps in each layer, since there are
    E^L pathways. Of a V-MoE all experts take part in each token, by the gates times the sum of the
    gates that the token has when deployed. The cost is that of E networks.
    """
    if model.num_experts == 1:
        return lambda x_BCHW: model(x_BCHW).logits
    if isinstance(model, TokenNetwork):
        hard = gate is soft_backward
        relax = soft_at(1.0) if hard else gate
        return lambda x_BCHW: model.along_soft(x_BCHW, relax, hard_forward=hard)
    if model.num_layers:
        return _layer_by_layer(model, gate)

    def logits(x_BCHW: Tensor) -> Tensor:
        gates_BE = gate(model.router_scores(x_BCHW))
        return torch.einsum("be,bek->bk", gates_BE, pathways(model, x_BCHW))

    return logits


def pathways(model: Network, x_BCHW: Tensor) -> Tensor:
    """Compute the logits of every expert's pathway, (B, E, K), for a network with one router."""
    batch, experts = len(x_BCHW), model.num_experts
    route = torch.arange(experts, device=x_BCHW.device).repeat_interleave(batch)
    logits_FK = model.along(x_BCHW.repeat(experts, 1, 1, 1), route)
    return logits_FK.view(experts, batch, -1).transpose(0, 1)


class RelaxedConv2d(nn.Module):
    """A self-routing mixture convolution that runs every expert: ``y = sum_e g_e (W_e conv x)``.

    Shares the parameters of the layer that it stands for, folded or not.
    """

    def __init__(self, layer: MoEConv2d, weigh: Gate):
        super().__init__()
        self.num_experts, self.stride, self.padding = layer.num_experts, layer.stride, layer.padding
        self.weight_FCRR, self.bias_D, self.gate = layer.weight_FCRR, layer.bias_D, layer.gate
        self.weigh = weigh

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        """Map features (B, C, H, W) to (B, D, P, Q)."""
        assert self.gate is not None
        scores_BE = self.gate(x_BCHW)
        routing.scores.append(scores_BE)
        routing.chosen.append(scores_BE.argmax(1))
        y_BFPQ = F.conv2d(x_BCHW, self.weight_FCRR, None, self.stride, self.padding)
        y_BEDPQ = y_BFPQ.view(len(x_BCHW), self.num_experts, -1, *y_BFPQ.shape[2:])
        y_BDPQ = torch.einsum("be,bedpq->bdpq", self.weigh(scores_BE), y_BEDPQ)
        return y_BDPQ if self.bias_D is None else y_BDPQ + self.bias_D[:, None, None]


def _layer_by_layer(model: Network, gate: Gate) -> Callable[[Tensor], Tensor]:
    twin, replaced = _swap(model, gate)
    if replaced != model.num_layers:
        raise ValueError(
            f"the body routes in {model.num_layers} layers, of which {replaced} are mixture "
            "convolutions with a gate: the others have no relaxed form"
        )
    return lambda x_BCHW: twin(x_BCHW).logits


def _same(module: M) -> M:
    """Copy the tree of modules; parameters are shared."""
    clone = copy.copy(module)
    children = module._modules.items()
    clone._modules = {name: child if child is None else _same(child) for name, child in children}
    return clone


def _swap(module: nn.Module, gate: Gate) -> tuple[nn.Module, int]:
    """Copy the tree of modules with every gated layer relaxed; parameters are shared."""
    if isinstance(module, MoEConv2d) and module.gate is not None:
        return RelaxedConv2d(module, gate), 1
    clone, replaced = copy.copy(module), 0
    clone._modules = dict(module._modules)
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name], count = _swap(child, gate)
            replaced += count
    return clone, replaced


VARIANTS: dict[str, Callable[[Network], Callable[[Tensor], Tensor]]] = {
    "hard": lambda model: lambda x_BCHW: model(x_BCHW).logits,
    "straight_through": straight_through,
    "soft_backward": lambda model: relaxed(model, soft_backward),
    "soft_1": lambda model: relaxed(model, soft_at(1.0)),
    "soft_0.1": lambda model: relaxed(model, soft_at(0.1)),
}


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """RA under attacks on the margin with the gradients of several kinds of gates.

    ``hard`` is the true gradient of the deployed network; ``straight_through`` that which trains
    the router, through the chosen expert; ``soft_backward`` has hard gates forward and a softmax
    over all experts backward; ``soft_1`` and ``soft_0.1`` mix the experts by a softmax at that
    temperature. An image stands if it stands against each, on the deployed network.

    Attributes:
        variants: Which of them, in the order in which they are tried. A dense net, where all are
            one, meets the first.

    Raises:
        ValueError: There is no variant, or not of this name.
    """

    title: ClassVar[str] = "RA, gradients of other gates"
    cost: ClassVar[float] = 7.0
    routed: ClassVar[bool] = True
    attack: Walker = PGD(steps=50)
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        if not self.variants or not set(self.variants) <= set(VARIANTS):
            raise ValueError(f"variants must be of {', '.join(VARIANTS)}, got {self.variants}")

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        for name in self.variants if model.num_experts > 1 else self.variants[:1]:
            logits = VARIANTS[name](model)

            def objective(
                x: Tensor, index: Tensor, f: Callable[[Tensor], Tensor] = logits
            ) -> Tensor:
                return margin_per_image(f(x), y_B[index])

            outcome = break_images(self.attack, model, objective, outcome, x_BCHW, y_B, noise)
        return outcome


@dataclass(frozen=True, kw_only=True)
class SurrogateAPGD:
    """RA under APGD on the margin with the gradients of several kinds of gates.

    Attributes:
        variants: As in ``Surrogate``.
    """

    title: ClassVar[str] = "RA, gradients of other gates, APGD"
    cost: ClassVar[float] = 7.0
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=100)
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        Surrogate(variants=self.variants)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        surrogate = Surrogate(attack=like(self.attack), variants=self.variants)
        return surrogate(model, x_BCHW, y_B, noise)
