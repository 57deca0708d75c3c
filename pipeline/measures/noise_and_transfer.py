"""What needs no gradient of the model: noise, and images made on another network."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, Role, break_images, is_correct, untouched
from pipeline.optimization.losses import margin_per_image


@dataclass(frozen=True, kw_only=True)
class RandomNoise:
    """RA under uniform noise in the same ball, one draw a restart: weaker than any attack."""

    title: ClassVar[str] = "accuracy under noise"
    cost: ClassVar[float] = 0.05
    role: ClassVar[Role] = "black_box"
    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        correct_B, x_adv = untouched(model, x_BCHW, y_B)
        for _ in range(self.attack.restarts):
            moved = replace(self.attack, start="uniform").begin(x_BCHW, noise)
            x_adv = moved.where(correct_B.view(-1, 1, 1, 1), x_adv)
            correct_B = correct_B & is_correct(model, moved, y_B)
        return Attacked(correct_B, x_adv)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """RA under PGD on the margin of another network, such as the dense twin or a dual's half.

    Attributes:
        source: A frozen network (``moe.fold_batchnorm.fold``) of the same classes and image size.
        origin: What names it beside its weights: a hash of these and of the settings that make
            them a network.
    """

    title: ClassVar[str] = "RA, images made on another model"
    role: ClassVar[Role] = "transfer"
    source: Network
    attack: PGD = PGD(steps=50)
    origin: str = ""

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        source = self.source.to(x_BCHW.device)

        def objective(x: Tensor, index: Tensor) -> Tensor:
            return margin_per_image(source(x).logits, y_B[index])

        before = untouched(model, x_BCHW, y_B)
        return break_images(self.attack, model, objective, before, x_BCHW, y_B, noise)
