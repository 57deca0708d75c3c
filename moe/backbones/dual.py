"""A dual model: two networks, each of them any other backbone."""

from __future__ import annotations

from dataclasses import dataclass

from moe.backbones.base import Backbone, RouterScope
from moe.backbones.mixture import NetworkMixture
from moe.dual_model import Dual, Mix
from moe.network import Network
from moe.valid_fields import UpToOne, check_fields


@dataclass(frozen=True, kw_only=True)
class DualNetworks:
    """``(1 - alpha) F_S + alpha F_R`` of two networks (RT-ER's dual model, arXiv:2502.06832).

    Attributes:
        standard, robust: Backbones of the halves, dense or with one router each.
        alpha: Weight of the robust half, in [0, 1]: in training with JTDMoE below 1, and at
            evaluation any (``python -m pipeline.dual`` sweeps it).
        mix: What is mixed: ``probabilities`` or ``logits``.

    Raises:
        ValueError: A setting is out of its range.
    """

    standard: Backbone = NetworkMixture()
    robust: Backbone = NetworkMixture()
    alpha: UpToOne = 0.5
    mix: Mix = "probabilities"

    def __post_init__(self) -> None:
        check_fields(self)
        for key in ("standard", "robust"):
            half: Backbone = getattr(self, key)
            if isinstance(half, DualNetworks):
                raise ValueError(f"{key} must be a single network, got another dual model")
            if half.num_experts > 1 and half.router_scope != "shared":
                raise ValueError(
                    f"{key}.router_scope must be shared in a dual model, got {half.router_scope!r}"
                )

    @property
    def num_experts(self) -> int:
        """Pairs of an expert of either half."""
        return self.standard.num_experts * self.robust.num_experts

    @property
    def ratio(self) -> float:
        """Width of the robust half's experts."""
        return self.robust.ratio

    @property
    def router_scope(self) -> RouterScope:
        """One router a half, on the image."""
        return "shared"

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels."""
        halves = [half.build(num_classes, image_size) for half in (self.standard, self.robust)]
        return Dual(*halves, alpha=self.alpha, mix=self.mix)
