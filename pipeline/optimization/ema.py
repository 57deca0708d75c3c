"""The average of the weights over the updates: what a run deploys where ``ema_decay`` is set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe.network import Network


@dataclass
class WeightAverage:
    """Exponential moving average of a model over its updates; without a decay, the model itself.

    ``a <- d a + (1 - d) w`` after each update, ``d = min(decay, (1 + t) / (10 + t))`` with t the
    updates averaged so far: averaging of iterates (Polyak and Juditsky, 1992; of deep nets:
    Izmailov et al., UAI 2018, arXiv:1803.05407; for robust accuracy: Gowal et al.,
    arXiv:2010.03593, decay 0.995). The rising decay is that of TensorFlow's
    ``ExponentialMovingAverage``: a short run forgets its first weights, where a bias correction
    would weigh all of them alike.

    BatchNorm's running statistics are averaged like weights. To re-estimate them takes a pass over
    the training images before each validation, on every worker, and a choice of what to show
    (clean or attacked images, which training mixes); they are averages already, and over the few
    hundred updates of a usual decay the features hardly drift.

    Attributes:
        decay: In [0, 1); 0 is off and costs nothing.
        updates: How many updates are in the average.
        network: The averaged network, frozen; None before the first update.
        followed: The network whose weights it averages.
    """

    decay: float = 0.0
    updates: int = 0
    network: Network | None = None
    followed: Network | None = None

    def deployed(self, model: Network) -> Network:
        """Return what is validated, kept as the model of a checkpoint and tested."""
        return self.network if self.network is not None and self.followed is model else model

    def follow(self, model: Network) -> None:
        """Take the weights after an update into the average.

        The first are its start; where a run goes on with another network, it begins again.
        """
        if not self.decay:
            return
        if self.network is None or self.followed is not model:
            self.network, self.followed, self.updates = frozen_copy(model), model, 0
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            now = model.state_dict()
            for name, mean in self.network.state_dict().items():
                if mean.is_floating_point():
                    mean.lerp_(now[name], 1 - decay)
                else:  # counts of batches
                    mean.copy_(now[name])
        self.updates += 1

    def saved(self, model: Network) -> dict[str, Any]:
        """What a checkpoint keeps beside the average, which it keeps as its model."""
        if self.deployed(model) is model:
            return {}
        return {"weights": model.state_dict(), "ema_updates": self.updates}

    def restore(self, saved: Mapping[str, Any], model: Network) -> None:
        """Take the average over from ``model``, into which a checkpoint's model was loaded.

        The model gets the weights that train back.
        """
        if "weights" not in saved:
            return
        if self.decay:
            self.network, self.followed = frozen_copy(model), model
            self.updates = saved["ema_updates"]
        model.load_state_dict(saved["weights"])


@torch.no_grad()
def frozen_copy(model: Network) -> Network:
    """Copy a network, weights and all, in eval mode and without gradients."""
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in twin.parameters():
        parameter.grad = None
    return twin
