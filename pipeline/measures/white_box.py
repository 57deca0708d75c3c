"""PGD on the whole model, by the true gradient of the deployed network (hard gates)."""

from dataclasses import dataclass

from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.losses import cross_entropy_per_image, margin_per_image
from pipeline.measures.attacked import Attacked, break_images
from pipeline.measures.clean import Clean


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
