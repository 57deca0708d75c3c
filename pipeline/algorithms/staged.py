"""The extension of an algorithm whose network changes on the way."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from moe.backbones import Backbone
from moe.network import Network


class Stage(NamedTuple):
    """A part of a run with one network, one set of optimizers and one schedule.

    Attributes:
        share: Of the run's updates; those of all stages add up to 1.
        rate: Peak learning rate over the run's ``lr``.
    """

    share: float
    rate: float


@runtime_checkable
class Staged(Protocol):
    """What an algorithm offers beside ``step`` where it trains several networks in turn.

    The loop begins with the network of stage 0; at the first update of each further stage it makes
    that stage's network, lets it take over from the one before, and goes on with fresh optimizers.
    The network of the last stage is the one that is selected, judged and deployed.
    """

    def stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        ...

    def build(self, stage: int, backbone: Backbone, num_classes: int, image_size: int) -> Network:
        """Make the network of a stage; but for stage 0, its numbers do not matter."""
        ...

    def hand_over(self, stage: int, old: Network, new: Network) -> None:
        """Fill the network of a stage in place from the trained one of the stage before."""
        ...
