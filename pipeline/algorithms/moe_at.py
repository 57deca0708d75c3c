"""AT (MoE): the baseline that steps router and experts together."""

from dataclasses import dataclass

from torch import Tensor

from moe.valid_fields import CheckedFields, NonNegative
from pipeline.algorithms.attack_objectives import AimKind, joint, with_auxiliary_loss
from pipeline.algorithms.trades import trades_terms
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.state import GROUPS, TrainState


@dataclass(frozen=True, kw_only=True)
class MoEAT(CheckedFields):
    """AdvMoE's loss and attack without its alternation (arXiv:2308.10110, "AT (MoE)").

    ``min CE(f(x), y) + beta KL(f(x) || f(x'))`` over experts and router at once; the router learns
    through the straight-through gate.

    Attributes:
        beta: Weight of stability against accuracy; 6 in the paper.
        aim: What x' raises beside ``KL(r)``: ``kl`` or ``ce``, see ``AdvMoE``.
        attack: How x' is found; 2 steps of 5/255 in the released code.
        attack_auxiliary_loss: Whether x' raises the auxiliary losses of token routers too.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: NonNegative = 6.0
    aim: AimKind = "kl"
    attack: Attack = PGD(step_size=5 / 255, steps=2, start="gaussian")
    attack_auxiliary_loss: bool = False

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""
        aim = joint(self.aim, y_B)
        if self.attack_auxiliary_loss:
            aim = with_auxiliary_loss(aim)
        x_adv = state.perturb(self.attack, aim, x_BCHW)
        terms = trades_terms(state, x_BCHW, x_adv, y_B)
        return state.minimize(terms, {"natural": 1.0, "robust": self.beta}, *GROUPS)
