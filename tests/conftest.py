"""One thread, an environment without the user's settings, and networks that use all experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe.backbones import BACKBONES
from moe.network import Network

torch.set_num_threads(1)

LAYERED = [name for name in BACKBONES if name not in ("vit", "mixture", "dual", "lipschitz")]
"""Backbones whose layers are mixtures."""

Build = Callable[..., Network]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROBUST_MOE_DATA", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def build() -> Build:
    """Make a network in eval mode, from seed 0, whose experts all get a share of random images."""

    def build(backbone: str = "small", size: int = 8, classes: int = 4, **settings: Any) -> Network:
        torch.manual_seed(0)
        return settled(BACKBONES[backbone](**settings).build(classes, size), size)

    return build


@pytest.fixture
def small(build: Build) -> Network:
    """Two experts of the small net, on 8 px and 4 classes."""
    return build(ratio=0.125)


def settled(model: Network, size: int) -> Network:
    """Give every BatchNorm the statistics of 64 random images, the routers' own included."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(64, 3, size, size))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
