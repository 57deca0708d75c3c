"""Training on noise: what the model is shown."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.network import Network
from pipeline.algorithms.gaussian import Gaussian
from pipeline.algorithms.standard import Standard
from tests.pipeline.algorithms.test_algorithms import batch, training

Build = Callable[..., Network]


def test_without_noise_it_is_standard_training_to_the_bit(build: Build) -> None:
    one, other = build(ratio=0.125), build(ratio=0.125)
    Gaussian(sigma=0.0).step(training(one), *batch())
    Standard().step(training(other), *batch())
    for found, want in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(found, want)


def test_noise_has_its_deviation_is_not_clipped_and_follows_the_seed(build: Build) -> None:
    model, (x_BCHW, y_B) = build(ratio=0.125), batch(64)
    seen: list[Tensor] = []
    for seed in (0, 0, 1):
        twin = copy.deepcopy(model)
        twin.normalize.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        Gaussian(sigma=0.5).step(training(twin, seed), x_BCHW, y_B)
    noise = seen[0] - x_BCHW
    assert noise.std() == pytest.approx(0.5, rel=0.03)
    assert noise.mean().abs() < 0.02
    assert seen[0].min() < 0
    assert seen[0].max() > 1
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_negative_deviation_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma must be at least 0, got -1"):
        Gaussian(sigma=-1)
