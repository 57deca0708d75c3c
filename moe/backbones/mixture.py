"""A mixture of whole networks, each of them any other backbone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moe.backbones.base import Backbone, RouterScope
from moe.backbones.small import Small
from moe.mixture_of_networks import Gate, LinearRouter, Mix, Mixture, check_gate
from moe.network import Network
from moe.routers import ImageRouter
from moe.valid_fields import Count, Ratio, check_fields


@dataclass(frozen=True, kw_only=True)
class NetworkMixture:
    """``num_experts`` whole classifiers of ``ratio`` the width, weighed by one router.

    Attributes:
        num_experts: 1 is the expert alone, a dense net; 4 in RT-ER (arXiv:2502.06832).
        ratio: Width of each expert over the dense width, in (0, 1].
        router_scope: ``shared``: there is one router, on the image.
        expert: Backbone of every expert, dense and of ratio 1: both are said here.
        top_k: Experts that take part in an image; 1 for ``gate=hard``, 2 or more for ``softmax``.
        gate: ``softmax``: renormalized over the ``top_k``, with its true gradient; ``hard``: the
            best expert alone, with a straight-through gradient in training.
        router: ``linear`` on the flattened image (RT-ER), or ``cnn``, AdvMoE's ResNet-20, whose
            scores are normalized over the batch.
        mix: What is averaged: ``probabilities`` or ``logits``.

    Raises:
        ValueError: A setting is out of its range.
    """

    num_experts: Count = 4
    ratio: Ratio = 1.0
    router_scope: RouterScope = "shared"
    expert: Backbone = Small(num_experts=1, ratio=1.0)
    top_k: int = 2
    gate: Gate = "softmax"
    router: Literal["linear", "cnn"] = "linear"
    mix: Mix = "probabilities"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.router_scope != "shared":
            raise ValueError(
                f"router_scope must be shared for whole networks, got {self.router_scope!r}"
            )
        if isinstance(self.expert, NetworkMixture):
            raise ValueError("expert must be a single network, got another mixture")
        for key in ("num_experts", "ratio"):
            if (value := getattr(self.expert, key)) != 1:
                raise ValueError(f"expert.{key} must be 1, got {value}; set {key} of the mixture")
        check_gate(self.gate, self.top_k, self.num_experts, self.mix)

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        one = replace(self.expert, ratio=self.ratio)  # type: ignore[type-var]
        experts = [one.build(num_classes, image_size) for _ in range(self.num_experts)]
        if self.num_experts == 1:
            return experts[0]
        if self.router == "linear":
            router: LinearRouter | ImageRouter = LinearRouter(self.num_experts, image_size)
        else:
            router = ImageRouter(self.num_experts)
        return Mixture(experts, router, gate=self.gate, top_k=self.top_k, mix=self.mix)
