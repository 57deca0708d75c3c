"""Attacks through gates that are not the deployed ones, judged on the deployed network."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe.network import Network
from pipeline.attacks import Walker
from pipeline.attacks.apgd import like
from pipeline.attacks.pgd import PGD, Draw
from pipeline.losses import margin_per_image
from pipeline.measures.attacked import Attacked, break_images, untouched
from pipeline.measures.relaxed import relaxed, soft_at, soft_backward, straight_through

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

    attack: PGD = PGD(steps=100)
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        Surrogate(variants=self.variants)

    def __call__(self, model: Network, x_BCHW: Tensor, y_B: Tensor, noise: Draw) -> Attacked:
        surrogate = Surrogate(attack=like(self.attack), variants=self.variants)
        return surrogate(model, x_BCHW, y_B, noise)
