"""PGD on the whole model, by the true gradient of the deployed network (hard gates)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.apgd import like
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, is_correct, untouched
from pipeline.optimization.losses import (
    cross_entropy_per_image,
    dlr_per_image,
    dlr_targeted_per_image,
    margin_per_image,
)


@dataclass(frozen=True, kw_only=True)
class WhiteBox:
    """RA under PGD on the cross-entropy of the deployed model."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def objective(x: Tensor, index: Tensor) -> Tensor:
            return cross_entropy_per_image(model(x).logits, y_B[index])

        before = Clean()(model, x_BCHW, y_B, noise)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class WhiteBoxMargin:
    """RA under PGD on the margin ``max_{k != y} z_k - z_y`` (Carlini and Wagner, 2017)."""

    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def objective(x: Tensor, index: Tensor) -> Tensor:
            return margin_per_image(model(x).logits, y_B[index])

        before = Clean()(model, x_BCHW, y_B, noise)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class AutoPGD:
    """RA under APGD on the cross-entropy (Croce and Hein, ICML 2020, arXiv:2003.01690)."""

    title: ClassVar[str] = "RA, APGD on the cross-entropy"
    attack: PGD = PGD(steps=100)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def objective(x: Tensor, index: Tensor) -> Tensor:
            return cross_entropy_per_image(model(x).logits, y_B[index])

        before = untouched(model, x_BCHW, y_B)
        return break_images(like(self.attack), model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class AutoPGDRatio:
    """RA under APGD on the difference of logits ratio, the margin for two classes."""

    title: ClassVar[str] = "RA, APGD on the ratio of logits"
    attack: PGD = PGD(steps=100)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        def objective(x: Tensor, index: Tensor) -> Tensor:
            return dlr_per_image(model(x).logits, y_B[index])

        before = untouched(model, x_BCHW, y_B)
        return break_images(like(self.attack), model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class AutoPGDTargeted:
    """RA under APGD on the targeted ratio, towards one class after the other.

    The targets are the classes with the highest logits on the clean image but for its own label.

    Attributes:
        targets: How many classes to aim at; all others where there are fewer.

    Raises:
        ValueError: There is no class to aim at.
    """

    title: ClassVar[str] = "RA, targeted APGD"
    cost: ClassVar[float] = 8.0
    attack: PGD = PGD(steps=100)
    targets: int = 9

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1, got {self.targets}")

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        with torch.no_grad():
            others_BK = model(x_BCHW).logits.scatter(1, y_B[:, None], float("-inf"))
        count = min(self.targets, others_BK.shape[1] - 1)
        for target_B in others_BK.topk(count).indices.unbind(1):

            def objective(x: Tensor, index: Tensor, to_B: Tensor = target_B) -> Tensor:
                return dlr_targeted_per_image(model(x).logits, y_B[index], to_B[index])

            outcome = break_images(like(self.attack), model, objective, outcome, x_BCHW, y_B, noise)
        return outcome


@dataclass(frozen=True, kw_only=True)
class Clean:
    """SA: accuracy on the images as they are."""

    title: ClassVar[str] = "SA, no attack"
    cost: ClassVar[float] = 0.05
    attack: PGD = PGD()

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        return Attacked(is_correct(model, x_BCHW, y_B), x_BCHW)
