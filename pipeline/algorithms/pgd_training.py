"""Adversarial training on the attacked images alone."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.algorithms.attack_objectives import error, with_auxiliary_loss
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.state import GROUPS, TrainState


@dataclass(frozen=True, kw_only=True)
class PGDTraining:
    """``min CE(f(x'), y)``, x' raising the same loss (Madry et al., ICLR 2018, arXiv:1706.06083).

    Attributes:
        attack: How x' is found; PGD-10 with steps of 2/255 is the common setting on CIFAR.
        attack_auxiliary_loss: Whether x' raises the auxiliary losses of token routers too.
    """

    attack: Attack = PGD()
    attack_auxiliary_loss: bool = False

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""
        aim = error(y_B)
        if self.attack_auxiliary_loss:
            aim = with_auxiliary_loss(aim)
        x_adv = state.perturb(self.attack, aim, x_BCHW)

        def terms() -> dict[str, Tensor]:
            return {"robust": state.cross_entropy(state.forward(x_adv).logits, y_B)}

        return state.minimize(terms, {"robust": 1.0}, *GROUPS)
