"""Models and images of a study, and the attack of arXiv:2210.10253 on them.

Shapes: B images, L layers that route, T decisions of a layer per image, E experts, M = L T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.mixture_of_networks import Mixture
from moe.network import Network
from moe.routing import best
from moe.token_network import TokenNetwork
from moe.valid_fields import Count, check_fields
from pipeline.attacks.apgd import APGD
from pipeline.attacks.pgd import PGD
from pipeline.config import Config
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.optimization.losses import cross_entropy_per_image
from pipeline.seeding import ImageNoise

BATCH = 64
GROUP = 4  # images of a group in the reference's attack
Work = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From pixels, labels and numbers of a batch to values with one row per image."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study.

    Attributes:
        images: Test images.
        eps: Radii in 255ths.
        steps: Of the attack, T.
        attack: ``clipped`` to [0, 1], images one by one, or ``released``, which is neither.
        seeds: Trainings of each variant, where a question trains.
        num_experts, top_k: Values of ``experts``.
        preset: What a question trains variants of, where no runs are given.
        seed: Of random choices.
    """

    images: Count = 500
    eps: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    steps: Count = 40
    attack: Literal["clipped", "released"] = "clipped"
    seeds: Count = 1
    num_experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    top_k: tuple[int, ...] = (1, 2)
    preset: str = "vmoe_cifar10_small"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.eps or min(self.eps) < 0:
            raise ValueError(f"eps must be one or more numbers of at least 0, got {self.eps}")


@dataclass(frozen=True)
class Subject:
    """A trained model and the images that it is studied on.

    Attributes:
        name: In tables.
        model: Frozen.
        images: Of the test split.
        variant: What it is one of several trainings of, in tables over seeds.
    """

    name: str
    model: Network
    config: Config
    images: Images
    variant: str = ""

    @property
    def group(self) -> str:
        """The variant, or the name where it is alone."""
        return self.variant or self.name

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield pixels in [0, 1], labels and numbers of the images."""
        for low in range(0, len(self.images), BATCH):
            rows = slice(low, low + BATCH)
            x_BCHW = to_float(self.images.pixels_NCHW[rows])
            index_B = torch.arange(low, low + len(x_BCHW))
            yield x_BCHW, self.images.labels_N[rows], index_B

    def over(self, work: Work) -> dict[str, Tensor]:
        """Run work on each batch and join what it returns, one row per image."""
        parts = [work(*batch) for batch in self.batches()]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def small_steps(
    model: Network, x_BCHW: Tensor, y_B: Tensor, eps: float, settings: StudySettings
) -> Tensor:
    """Attack the cross-entropy by T steps of eps/T from the clean image (arXiv:2210.10253).

    ``released``: pixels may leave [0, 1], and groups of four images share a mean loss, which makes
    a difference where they share the experts' capacity.
    """
    steps = settings.steps
    if settings.attack == "clipped":
        attack = PGD(eps=eps, step_size=eps / steps, steps=steps, start="clean")
        return attack(lambda x: cross_entropy_per_image(model(x).logits, y_B), x_BCHW)
    groups = zip(torch.split(x_BCHW, GROUP), torch.split(y_B, GROUP), strict=True)
    found = []
    for x_own, y_own in groups:
        x_adv = x_own.detach()
        for _ in range(steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy_per_image(model(x_adv).logits, y_own).mean()
                (slope,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + eps / steps * slope.sign()
        found.append(x_adv)
    return torch.cat(found)


def auto_pgd(
    model: Network, x_BCHW: Tensor, y_B: Tensor, index_B: Tensor, eps: float, steps: int
) -> Tensor:
    """Attack the cross-entropy by APGD (arXiv:2003.01690) with seeded starts."""
    attack = APGD(eps=eps, steps=steps)
    noise = ImageNoise(0, index_B)
    return attack(lambda x: cross_entropy_per_image(model(x).logits, y_B), x_BCHW, noise)


def correct(model: Network, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Judge on the deployed model, bool (B,)."""
    with torch.no_grad():
        hits_B: Tensor = model(x_BCHW).logits.argmax(1) == y_B
    return hits_B


def layered(model: Network, per_decision: Tensor) -> Tensor:
    """View values per decision, (B, E) or (B, M, E), as (B, L, T, E)."""
    if per_decision.dim() == 2:
        return per_decision[:, None, None]
    return torch.unflatten(per_decision, 1, (-1, model.tokens))


@torch.no_grad()
def expert_weights(model: Network, scores: Tensor) -> Tensor:
    """Weight of each expert in each decision as deployed, (B, L, T, E), from ``routing_scores``.

    Of a model that routes images the chosen expert has weight 1; of whole networks those that take
    part share it by their softmax.
    """
    if isinstance(model, TokenNetwork):
        layers = layered(model, scores).unbind(1)
        pairs = zip(model.mixtures.values(), layers, strict=True)
        found = [torch.unflatten(m.weights(own), 0, own.shape[:2]) for m, own in pairs]
        return torch.stack(found, 1)
    count = model.top_k if isinstance(model, Mixture) else 1
    flat = scores.reshape(-1, scores.shape[-1])
    chosen = best(flat, count)
    weights = flat.gather(1, chosen).softmax(1)
    return layered(model, torch.zeros_like(flat).scatter(1, chosen, weights).view_as(scores))


def chosen_per_decision(model: Network) -> int:
    """Experts that take part in a decision, k."""
    if isinstance(model, TokenNetwork):
        return next(iter(model.mixtures.values())).settings.top_k
    return model.top_k if isinstance(model, Mixture) else 1


def is_soft(model: Network) -> bool:
    """Whether every slot takes part in every token (Soft MoE): there are no ranks."""
    return isinstance(model, TokenNetwork) and any(
        layer.settings.router == "soft" for layer in model.mixtures.values()
    )


def shortened(images: Images, count: int) -> Images:
    """Take the first images; they are shuffled where they are read."""
    return images if len(images) <= count else images.pick(torch.arange(count))
