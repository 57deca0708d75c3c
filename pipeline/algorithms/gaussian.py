"""Training on noisy images: what a classifier needs before it is smoothed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe.valid_fields import CheckedFields, NonNegative
from pipeline.optimization.state import GROUPS, TrainState


@dataclass(frozen=True, kw_only=True)
class Gaussian(CheckedFields):
    """``min CE(f(x + e), y)``, ``e ~ N(0, sigma^2 I)``, over all groups.

    The training of randomized smoothing (Cohen et al., ICML 2019, arXiv:1902.02918, section 3.3);
    the noise is not clipped to [0, 1]. Certify with the same sigma: ``pipeline.certify``.

    Attributes:
        sigma: Deviation of the noise, in pixel units.

    Raises:
        ValueError: sigma is negative.
    """

    selects: ClassVar[str] = "val/sa"
    sigma: NonNegative = 0.25

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update all groups from pixels in [0, 1]; return detached losses in nats per image."""
        noisy_BCHW = x_BCHW + self.sigma * state.noise.normal(x_BCHW)

        def terms() -> dict[str, Tensor]:
            return {"noisy": state.cross_entropy(state.forward(noisy_BCHW).logits, y_B)}

        return state.minimize(terms, {"noisy": 1.0}, *GROUPS)
