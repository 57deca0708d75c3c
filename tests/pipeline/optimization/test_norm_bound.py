"""Norm control: after each update no layer is longer than its bound, and certificates say more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moe.backbones.lipschitz import Lipschitz
from moe.backbones.mixture import NetworkMixture
from moe.backbones.small import Small
from pipeline import checkpoint, loop
from pipeline.algorithms.standard import Standard
from pipeline.certify.certificates import prove
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.data.digits import Digits
from pipeline.data.synthetic import Synthetic
from pipeline.optimization.norm_bound import bound_norms


def sums(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().flatten(1).abs().sum(1)


def test_long_rows_shrink_to_the_bound_and_short_ones_stay_to_the_bit() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, -1.0], [0.5, 0.25], [0.0, 0.0]]))
    filters = nn.Parameter(torch.randn(4, 3, 3, 3))
    bias = nn.Parameter(torch.tensor([9.0]))
    before = weight.detach().clone()
    bound_norms([weight, filters, bias], 2.0)
    assert torch.equal(weight[0], before[0] / 2)
    assert torch.equal(weight[1:], before[1:])
    assert torch.allclose(sums(filters), torch.full((4,), 2.0))
    assert bias == 9


@pytest.mark.parametrize("backbone", [NetworkMixture(expert=Lipschitz()), Small(ratio=0.125)])
def test_every_layer_of_a_trained_model_keeps_its_bound(backbone: object, tmp_path: Path) -> None:
    config = Config(
        dataset=Synthetic(size=8, train_images=64, test_images=8),
        backbone=backbone,  # type: ignore[arg-type]
        algorithm=Standard(),
        epochs=1,
        batch_size=32,
        norm_bound=0.5,
    )
    config = override(config, {"evaluation.steps": 1, "evaluation.validation_steps": 1})
    loop.fit(config, tmp_path)
    model = checkpoint.load_model(tmp_path / "checkpoints" / "best")
    longest = [float(sums(p).max()) for p in model.parameters() if p.dim() > 1]
    assert max(longest) == pytest.approx(0.5)


def test_fingerprints_of_runs_without_it_are_as_they_were() -> None:
    """The hash of the default settings before there was such a key."""
    assert Config().fingerprint == Config(norm_bound=0.0).fingerprint
    assert Config().fingerprint != Config(norm_bound=1.0).fingerprint
    assert Config().fingerprint.startswith("958a4c0410e7")


def test_bound_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_bound must be at least 0, got -1"):
        Config(norm_bound=-1)


def test_lipschitz_experts_are_certified_on_digits_where_a_free_net_is_not(tmp_path: Path) -> None:
    """The project's loop, 359 real images: theorem 5.4 gives radii above zero that matter."""
    config = Config(
        dataset=Digits(),
        backbone=NetworkMixture(num_experts=2, expert=Lipschitz(depth=1)),
        algorithm=Standard(),
        epochs=12,
        batch_size=64,
        optimizer="adam",
        lr=0.02,
        weight_decay=0.0,
        norm_bound=3.0,
    )
    config = override(config, {"evaluation.steps": 1, "evaluation.validation_steps": 1})
    shares = {}
    for name, bound in (("bounded", config.norm_bound), ("free", 0.0)):
        loop.fit(override(config, {"norm_bound": bound}), tmp_path / name)
        model = checkpoint.load_model(tmp_path / name / "checkpoints" / "best")
        test = config.dataset.load(0).test
        _, found = prove(model, test, ["theorem", "floor"])
        for kind, eps in (("theorem", 2), ("floor", 2), ("floor", 8)):
            shares[name, kind, eps] = found[kind].stands(eps / 255) / len(test)
    assert shares["bounded", "theorem", 2] > 0.6
    assert shares["bounded", "floor", 2] >= shares["bounded", "theorem", 2]
    assert shares["free", "theorem", 2] < 0.1
    assert shares["bounded", "floor", 8] > shares["free", "floor", 8] + 0.15
