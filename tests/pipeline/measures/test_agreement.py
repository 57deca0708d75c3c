"""Our attacks against those of foolbox and pyautoattack, on the same images of one dense net."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones import BACKBONES
from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.attacks.pgd import PGD
from pipeline.data import DATASETS
from pipeline.data.augmentation import to_float
from pipeline.measures import MEASURES
from pipeline.measures.base import is_correct
from pipeline.seeding import ImageNoise

IMAGES = 160
EPS = {"linf": 0.1, "l2": 0.7}
STEPS = 50


class Trained(NamedTuple):
    model: Network
    x_BCHW: Tensor
    y_B: Tensor


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Train a small dense net on digits, with noise, to about 95% and half of that attacked."""
    splits = DATASETS["digits"]().load(0)
    x_NCHW, y_N = to_float(splits.train.pixels_NCHW), splits.train.labels_N
    torch.manual_seed(0)
    model = BACKBONES["small"](num_experts=1, ratio=0.125).build(10, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(6):
        for rows in torch.randperm(len(y_N)).split(100):
            noisy = x_NCHW[rows] + 0.2 * torch.rand_like(x_NCHW[rows]) - 0.1
            optimizer.zero_grad()
            F.cross_entropy(model(noisy).logits, y_N[rows]).backward()
            optimizer.step()
    test = splits.test.pick(torch.arange(IMAGES))
    return Trained(fold(model), to_float(test.pixels_NCHW), test.labels_N)


def ours(name: str, trained: Trained, norm: Any) -> Tensor:
    eps = EPS[norm]
    attack = PGD(eps=eps, step_size=eps / 10, steps=STEPS, norm=norm)
    source = ImageNoise(0, torch.arange(IMAGES))
    return MEASURES[name](attack=attack)(*trained, source).correct_B


def assert_within_sampling_error(ours_B: Tensor, theirs_B: Tensor) -> None:
    """Few images differ, and they part like coins: |b - c| within 3 deviations, sqrt(b + c)."""
    only_ours, only_theirs = int((ours_B & ~theirs_B).sum()), int((~ours_B & theirs_B).sum())
    assert only_ours + only_theirs <= 0.08 * IMAGES
    assert abs(only_ours - only_theirs) <= 3 * (only_ours + only_theirs) ** 0.5
    assert 0.15 * IMAGES < theirs_B.sum() < 0.8 * IMAGES, "neither all nor nothing"


class Logits(nn.Module):
    """What other libraries take for a model."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.model(x_BCHW).logits


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_agrees_with_foolbox(trained: Trained, norm: Any) -> None:
    foolbox = pytest.importorskip("foolbox", reason="a development dependency")
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=EPS[norm] / 10, steps=STEPS)
    wrapped = foolbox.PyTorchModel(Logits(trained.model).eval(), bounds=(0, 1), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, _, broken_B = attack(wrapped, trained.x_BCHW, trained.y_B, epsilons=EPS[norm])
    assert_within_sampling_error(ours("ra_pgd", trained, norm), ~broken_B)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("name", "loss"), [("ra_apgd", "ce"), ("ra_apgd_dlr", "dlr")])
def test_apgd_agrees_with_autoattack(trained: Trained, name: str, loss: str, norm: Any) -> None:
    package = pytest.importorskip("pyautoattack.autopgd_base", reason="needs the extra eval")
    attack = package.APGDAttack(
        Logits(trained.model),
        n_iter=STEPS,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=EPS[norm],
        seed=0,
        loss=loss,
        device="cpu",
    )
    with torch.random.fork_rng():
        theirs = attack.perturb(trained.x_BCHW, trained.y_B)
    theirs_B = is_correct(trained.model, theirs, trained.y_B)
    assert_within_sampling_error(ours(name, trained, norm), theirs_B)


def test_targeted_apgd_agrees_with_autoattack(trained: Trained) -> None:
    package = pytest.importorskip("pyautoattack.autopgd_base", reason="needs the extra eval")
    attack = package.APGDAttack_targeted(
        Logits(trained.model),
        n_iter=STEPS,
        eps=EPS["linf"],
        seed=0,
        n_target_classes=9,
        device="cpu",
    )
    with torch.random.fork_rng():
        theirs = attack.perturb(trained.x_BCHW, trained.y_B)
    theirs_B = is_correct(trained.model, theirs, trained.y_B)
    assert_within_sampling_error(ours("ra_apgd_t", trained, "linf"), theirs_B)
