"""What every backbone offers."""

from typing import Literal, Protocol

from moe.network import Network

RouterScope = Literal["shared", "per_layer"]


class Backbone(Protocol):
    """Settings are fields; ``build`` makes the network.

    ``ratio`` scales the width of one expert (r of AdvMoE); ``num_experts`` of 1 is a dense net
    without a router, so ``num_experts=1, ratio=0.5`` is the paper's S-Dense.
    """

    @property
    def num_experts(self) -> int: ...
    @property
    def ratio(self) -> float: ...
    @property
    def router_scope(self) -> RouterScope: ...

    def build(self, num_classes: int, image_size: int) -> Network: ...
    def __hash__(self) -> int: ...
