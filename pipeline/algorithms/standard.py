"""Training without an attack."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.losses import cross_entropy_per_image
from pipeline.state import GROUPS, TrainState


@dataclass(frozen=True, kw_only=True)
class Standard:
    """``min CE(f(x), y)`` over experts and router together."""

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""
        natural = cross_entropy_per_image(state.model(x_BCHW).logits, y_B).mean()
        state.descend(natural, *GROUPS)
        return {"natural": natural.detach()}
