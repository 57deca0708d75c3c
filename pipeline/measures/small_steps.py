"""The attack of arXiv:2210.10253 on V-MoE, and attacks along the routes of other images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.network import Network
from pipeline.attacks.pgd import PGD, Draw
from pipeline.measures.base import Attacked, break_images, untouched
from pipeline.optimization.losses import cross_entropy_per_image


@dataclass(frozen=True, kw_only=True)
class SmallSteps:
    """RA under T steps of eps/T from the clean image on the cross-entropy (arXiv:2210.10253).

    As it should be: clipped to [0, 1], images one by one. The released form, which clips nothing
    and drives an image by the mean loss of its group, is ``attack=released`` of ``pipeline.study``:
    its images are none that a camera makes, and count in no verdict.

    Attributes:
        attack: Radius and norm; step and start are this attack's own.
        steps: T, 40 in the paper.
    """

    title: ClassVar[str] = "RA, small steps from the clean image"
    attack: PGD = PGD(steps=40)
    steps: int = 40

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        eps, norm = self.attack.eps, self.attack.norm
        own = PGD(eps=eps, step_size=eps / self.steps, steps=self.steps, norm=norm, start="clean")

        def objective(x: Tensor, index: Tensor) -> Tensor:
            return cross_entropy_per_image(model(x).logits, y_B[index])

        before = untouched(model, x_BCHW, y_B)
        return break_images(own, model, objective, before, x_BCHW, y_B, noise)


@dataclass(frozen=True, kw_only=True)
class OtherRoutes:
    """RA under PGD along routes of other images: the mirrored one, then the negative.

    Gradients of experts that the router does not choose here; success is that of the deployed
    model. Both images are made of the attacked one, so that the outcome does not depend on the
    batch.
    """

    title: ClassVar[str] = "RA, along routes of other images"
    cost: ClassVar[float] = 2.0
    routed: ClassVar[bool] = True
    attack: PGD = PGD(steps=50)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        outcome = untouched(model, x_BCHW, y_B)
        for other in (x_BCHW.flip(3), 1 - x_BCHW):
            with torch.no_grad():
                scores = model.routing_scores(other)

            def objective(x: Tensor, index: Tensor, held: Tensor = scores) -> Tensor:
                return cross_entropy_per_image(model.held(x, held[index]), y_B[index])

            outcome = break_images(self.attack, model, objective, outcome, x_BCHW, y_B, noise)
        return outcome
