"""A network trained on another's labels attacks it where its gradients are of no use."""

from __future__ import annotations

import torch
from torch import nn

from moe.network import Network
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images
from pipeline.measures.gradient_attack import WhiteBoxMargin
from pipeline.measures.noise_and_transfer import Transfer
from pipeline.measures.substitute import agreement, train_substitute
from pipeline.seeding import ImageNoise
from tests.helpers import defences

CPU = torch.device("cpu")
ATTACK = PGD(eps=0.1, step_size=0.025, steps=20)


def patterns(count: int, seed: int) -> Images:
    """Images of two classes: the left or the right half is the lighter one."""
    generator = torch.Generator().manual_seed(seed)
    y_N = torch.randint(2, (count,), generator=generator)
    x_NCHW = 0.3 + 0.3 * torch.rand(count, 3, 8, 8, generator=generator)
    shift_NHW = (0.06 * (2.0 * y_N - 1)).view(-1, 1, 1) * torch.linspace(-1, 1, 8).sign()
    pixels_NCHW = (255 * (x_NCHW + shift_NHW[:, None])).clamp(0, 255).round().to(torch.uint8)
    return Images(pixels_NCHW, y_N)


def half_detector() -> Network:
    side_W = nn.Parameter(torch.linspace(-1, 1, 8).sign())
    return defences.dense(lambda x: torch.stack([-x @ side_W, x @ side_W], -1).mean((1, 2)))


def test_substitute_breaks_what_a_permuted_gradient_hides() -> None:
    train, test = patterns(1024, 0), patterns(64, 1)
    open_net = half_detector()
    hidden = defences.hard_gradient(open_net, defences.Permuted.apply)
    learnt, again = (
        train_substitute(hidden, train, ATTACK, num_classes=2, seed=0, device=CPU, updates=40)
        for _ in range(2)
    )
    x_BCHW, noise = to_float(test.pixels_NCHW), ImageNoise(0, torch.arange(64))

    def stand(measure: WhiteBoxMargin | Transfer, net: Network) -> int:
        return int(measure(net, x_BCHW, test.labels_N, noise).correct_B.sum())

    truth = stand(WhiteBoxMargin(attack=ATTACK), open_net)
    blind = stand(WhiteBoxMargin(attack=ATTACK), hidden)
    found = stand(Transfer(source=learnt, attack=ATTACK), hidden)
    assert agreement(learnt, hidden, test, CPU) > 0.9
    assert blind > truth + 20
    assert found < truth + 0.5 * (blind - truth)
    assert not any(p.requires_grad for p in learnt.parameters())
    for key, value in learnt.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_substitute_learns_labels_and_not_logits() -> None:
    """The scale of the logits, which changes no answer, changes no weight."""
    net = half_detector()
    scaled = defences.dense(lambda x: 1e4 * net(x).logits, net)
    train = patterns(256, 0)
    found = [
        train_substitute(own, train, ATTACK, num_classes=2, seed=0, device=CPU, updates=5)
        for own in (net, scaled)
    ]
    one, two = (own.state_dict() for own in found)
    assert all(torch.equal(one[key], two[key]) for key in one)
