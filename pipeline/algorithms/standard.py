"""Training without an attack."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pipeline.optimization.state import GROUPS, TrainState


@dataclass(frozen=True, kw_only=True)
class Standard:
    """``min CE(f(x), y)`` over experts and router together."""

    selects: ClassVar[str] = "val/sa"

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""

        def terms() -> dict[str, Tensor]:
            return {"natural": state.cross_entropy(state.forward(x_BCHW).logits, y_B)}

        return state.minimize(terms, {"natural": 1.0}, *GROUPS)
