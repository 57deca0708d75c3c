"""AdvMoE that starts from a dense pathway: upcycling as a first stage of the run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.backbones import Backbone
from moe.expert_pathway import fill_experts, pathway
from moe.network import Network
from moe.valid_fields import InsideOne, Positive
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.staged import Stage
from pipeline.algorithms.trades import Trades
from pipeline.optimization.state import TrainState


@dataclass(frozen=True, kw_only=True)
class UpcycledAdvMoE(AdvMoE):
    """TRADES on one pathway, which then becomes every expert of a mixture; AdvMoE from there.

    Against starvation: each of E experts sees about 1/E of the images, so a short run trains it on
    too few. Here all of them share the first stage. Against flipped routes: the experts start
    equal, so the choice of another expert costs nothing until they differ. Sparse upcycling is by
    Komatsuzaki et al. (ICLR 2023, arXiv:2212.05055); its use here is ours.

    Attributes:
        beta, aim, attack: Of both stages, as in ``AdvMoE``.
        alpha, router_loss, minibatches, homes, forced_routes: Of the mixture's, as there.
        dense_share: Part of the run's updates that train the pathway, above 0 and below 1.
        mixture_rate: Peak learning rates of the mixture's stage over those of the run.

    Raises:
        ValueError: A setting is out of its range.
    """

    dense_share: InsideOne = 0.6
    mixture_rate: Positive = 0.3

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update the pathway, or experts and router in turn; return losses in nats per image."""
        if state.model.num_experts == 1:
            dense = Trades(beta=self.beta, aim=self.aim, attack=self.attack)
            return dense.step(state, x_BCHW, y_B)
        return super().step(state, x_BCHW, y_B)

    def stages(self) -> tuple[Stage, ...]:
        """The dense pathway, then the mixture."""
        return Stage(self.dense_share, 1.0), Stage(1 - self.dense_share, self.mixture_rate)

    def build(self, stage: int, backbone: Backbone, num_classes: int, image_size: int) -> Network:
        """Make the pathway, or the mixture."""
        mixture = backbone.build(num_classes, image_size)
        return mixture if stage else pathway(mixture)

    def hand_over(self, stage: int, old: Network, new: Network) -> None:
        """Copy the pathway, BatchNorm included, into every expert."""
        fill_experts(old, new)
