"""Settings of a benchmark, and the networks and images that follow from them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from moe.backbones import BACKBONES, Backbone, RouterScope
from moe.network import Network
from pipeline.config.overrides import parse
from pipeline.nearest_names import unknown

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        backbone, num_experts, ratio, router_scope: The mixture; its dense twin has one expert of
            the full width.
        router_loss, attack_steps: Of the AdvMoE update.
        batch, image_size: Images a call, and their side in pixels.
        attacked: Images of ``autoattack``.
        attack_share: Of the standard version's steps and queries, above 0 and at most 1. The ratio
            does not depend on it, but on the number of images: less of it leaves time for more.
        updates, epochs: Of a run of ``pipeline``, the first epoch not counted.
        rounds: In which each variant of ``step`` has one turn, and of ``inference`` three.
        threads: CPU threads; as many as torch takes by itself unless said.
        device: Where the networks run.
        compiled: Whether ``inference`` has rows of ``torch.compile`` too; minutes of compiling.
        precision: Of these rows.

    Raises:
        ValueError: A setting is out of its range; the message names it, its value and the range.
    """

    backbone: str = "resnet18"
    num_experts: int = 2
    ratio: float = 0.5
    router_scope: RouterScope = "shared"
    router_loss: Literal["trades", "pseudo_label"] = "trades"
    attack_steps: int = 2
    batch: int = 128
    image_size: int = 32
    attacked: int = 8
    attack_share: float = 1.0
    updates: int = 4
    epochs: int = 4
    rounds: int = 3
    threads: int = field(default_factory=torch.get_num_threads)
    device: Literal["cpu", "cuda"] = "cpu"
    compiled: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise unknown("backbone", self.backbone, BACKBONES)
        lowest = {"num_experts": 2, "batch": 1, "image_size": 8, "attack_steps": 0}
        lowest |= {"attacked": 2, "epochs": 2}
        whole = (*lowest, "updates", "rounds", "threads")
        for key in whole:
            if (value := getattr(self, key)) < (least := lowest.get(key, 1)):
                raise ValueError(f"{key} must be at least {least}, got {value}")
        if not 0 < self.attack_share <= 1:
            raise ValueError(f"attack_share must be above 0 and at most 1, got {self.attack_share}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where torch sees no GPU, got 'cuda'")
        self._kind(self.num_experts, self.ratio)

    def mixture(self) -> Network:
        """Make the mixture network, from seed 0."""
        return self._build(self.num_experts, self.ratio)

    def dense(self) -> Network:
        """Make its dense twin."""
        return self._build(1, 1.0)

    def _kind(self, num_experts: int, ratio: float) -> Backbone:
        kind = BACKBONES[self.backbone]
        return kind(num_experts=num_experts, ratio=ratio, router_scope=self.router_scope)  # type: ignore[call-arg]

    def _build(self, num_experts: int, ratio: float) -> Network:
        torch.manual_seed(0)
        return self._kind(num_experts, ratio).build(CLASSES, self.image_size).to(self.device)

    def images(self, least: int = 1) -> tuple[Tensor, Tensor]:
        """Draw random images in [0, 1] and labels, at least so many."""
        batch = max(least, self.batch)
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, self.image_size, self.image_size)
        x_BCHW = torch.rand(shape, generator=generator)
        y_B = torch.randint(CLASSES, (batch,), generator=generator)
        return x_BCHW.to(self.device), y_B.to(self.device)


def read_settings(given: Mapping[str, str]) -> Settings:
    """Read ``key=value`` pairs.

    Raises:
        ValueError: No such key, or its value is not valid.
    """
    hints, values = typing.get_type_hints(Settings), dict[str, Any]()
    known = [field.name for field in fields(Settings)]
    for key, text in given.items():
        if key not in known:
            raise unknown("key", key, known)
        values[key] = parse(key, text, hints[key])
    return Settings(**values)


@torch.no_grad()
def settle(model: Network, x_BCHW: Tensor) -> Network:
    """Set all running statistics to those of these images, as in a network that has trained.

    A fresh router is normalized by means of zero and sends all images to one expert.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x_BCHW)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.eval()
