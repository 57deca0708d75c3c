"""What a mask leaves is what pruning leaves; scores learn which channels count.

Shapes: B images, D channels of a group, CHW channels and sides, K classes.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones import BACKBONES
from moe.cost import cost
from moe.fold_batchnorm import fold
from moe.network import Network
from moe.normalize import Normalize
from moe.pruning.channel_groups import layers_of, weight_of
from moe.pruning.hydra import ScoredBody, scored, scored_body, top_mask
from moe.routing import Routing
from tests.conftest import LAYERED, settled
from tests.moe.pruning.test_channel_groups import Dense, Residual, conv


def pair(name: str, size: int, ratio: float = 0.5, scale: float = 0.25) -> tuple[Network, Any]:
    """A scored network with made-up scores, and the maker of the small one."""
    wide = BACKBONES[name](num_experts=1, ratio=scale)
    small = replace(wide, ratio=scale * ratio)  # type: ignore[type-var]
    torch.manual_seed(0)
    dense = settled(wide.build(4, size), size)
    model = scored(dense, small.build(4, size), size).double().eval()
    for scores_D in scored_body(model).scores:
        scores_D.data.normal_()
    return model, small


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 32) for name in LAYERED), ("resnet18", 65), ("small", 8)]
)
def test_pruned_net_is_the_masked_dense_net_in_eval_mode(name: str, size: int) -> None:
    model, backbone = pair(name, size)
    small = backbone.build(4, size).double().eval()
    scored_body(model).prune_into(small.body)
    x_BCHW = torch.rand(3, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x_BCHW).logits, model(x_BCHW).logits, rtol=0, atol=1e-10)
        folded = fold(model)(x_BCHW).logits
        torch.testing.assert_close(folded, model(x_BCHW).logits, rtol=0, atol=1e-10)
        whole = Network(
            scored_body(model).dense, None, normalize=model.normalize, num_experts=1
        ).eval()
        assert (whole(x_BCHW).logits - model(x_BCHW).logits).abs().max() > 1e-3, "it does prune"


@pytest.mark.parametrize("name", LAYERED)
def test_pruned_net_trains_as_the_masked_dense_net_would(name: str) -> None:
    """By the batch's statistics: outputs, gradients of the weights, and the running statistics."""
    model, backbone = pair(name, 32)
    body = scored_body(model)
    small = backbone.build(4, 32).double().train()
    body.prune_into(small.body)
    model.train()
    body.dense.requires_grad_(True)
    x_BCHW = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for net in (small, model):
        net(x_BCHW).logits.square().sum().backward()
    copied = backbone.build(4, 32).double()
    body.prune_into(copied.body)
    wanted = dict(copied.named_buffers())
    for key, buffer in small.named_buffers():
        torch.testing.assert_close(buffer, wanted[key], rtol=0, atol=1e-10, msg=key)
    for parameter in body.dense.parameters():
        assert parameter.grad is not None
        parameter.data.copy_(parameter.grad)
    body.prune_into(copied.body)
    gradients = dict(copied.named_parameters())
    for key, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].data, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LAYERED)
def test_result_costs_what_s_dense_costs(name: str) -> None:
    model, backbone = pair(name, 32)
    small, s_dense = backbone.build(4, 32).double(), backbone.build(4, 32)
    scored_body(model).prune_into(small.body)
    assert cost(s_dense, 32) == cost(small.float(), 32)


@pytest.mark.parametrize("wiring", ["residual", "dense"])
def test_pre_activation_and_concatenation_are_pruned_exactly(wiring: str) -> None:
    def make(w: int) -> nn.Module:
        if wiring == "residual":
            return Residual(
                stem=conv(3, 2 * w),
                before=nn.BatchNorm2d(2 * w),
                first=conv(2 * w, 3 * w),
                norm=nn.BatchNorm2d(3 * w),
                second=conv(3 * w, 2 * w, 1),
                head=nn.Linear(2 * w, 4),
            )
        return Dense(
            stem=conv(3, 2 * w),
            norm=nn.BatchNorm2d(2 * w),
            first=conv(2 * w, 3 * w),
            second=conv(5 * w, w),
            transition=conv(6 * w, 4 * w, 1),
            head=nn.Linear(4 * w, 4),
        )

    dense, small = make(4).double(), make(2).double().eval()
    x_BCHW, routing = torch.rand(8, 3, 8, 8, dtype=torch.float64), Routing()
    for norm in (m for m in dense.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)  # a pruned channel is not zero behind its BatchNorm
    dense.train()(x_BCHW, routing)
    body = ScoredBody(dense, small, 8).double().eval()
    for scores_D in body.scores:
        scores_D.data.normal_()
    body.prune_into(small)
    torch.testing.assert_close(body(x_BCHW, routing), small(x_BCHW, routing), rtol=0, atol=1e-10)


# The mask and its scores


def test_mask_keeps_the_highest_and_among_equals_the_first() -> None:
    assert top_mask(torch.tensor([0.1, -3.0, 0.7, 0.2]), 2).tolist() == [0, 0, 1, 1]
    assert top_mask(torch.tensor([0.3, 0.3, 0.3, 0.3]), 3).tolist() == [1, 1, 1, 0]
    scores_D = torch.rand(1000) * 1e8
    assert set(top_mask(scores_D, 10).tolist()) == {0.0, 1.0}, "exactly, whatever the scores"


def test_gradient_of_the_mask_goes_straight_to_every_score() -> None:
    scores_D = torch.tensor([0.1, -3.0, 0.7, 0.2], requires_grad=True)
    weight_D = torch.tensor([5.0, 6.0, 7.0, 8.0])
    (top_mask(scores_D, 2) * weight_D).sum().backward()
    assert scores_D.grad is not None
    assert scores_D.grad.tolist() == weight_D.tolist()


def test_gradient_of_a_score_is_that_of_a_factor_on_all_that_is_read_of_its_channel() -> None:
    """Pruned channels too: what the loss would do if they were let in a little."""
    model, _ = pair("small", 8)
    body, x_BCHW = scored_body(model), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    loss = model(x_BCHW).logits.square().sum()
    gradients = torch.autograd.grad(loss, list(body.scores))
    for (group, _), gradient_D in zip(body.scored, gradients, strict=True):
        pruned_D = body.mask()[group.span] < 0.5
        assert gradient_D[pruned_D].any()
        for channel in (0, group.width - 1):
            moved = []
            for step in (1e-5, -1e-5):
                factor_N = body.mask().detach()
                factor_N[group.first + channel] += step
                moved.append(_masked_loss(model, factor_N, x_BCHW))
            slope = (moved[0] - moved[1]) / 2e-5
            assert gradient_D[channel].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def _masked_loss(model: Network, factor_N: Tensor, x_BCHW: Tensor) -> float:
    body = copy.deepcopy(scored_body(model).dense)
    for name, layer in layers_of(body).items():
        factor_F = factor_N[scored_body(model).coupling.reads[name]]
        weight = weight_of(layer)
        weight.data *= factor_F.view(1, -1, *[1] * (weight.dim() - 2))
    net = Network(body, None, normalize=model.normalize, num_experts=1).eval()
    with torch.no_grad():
        return float(net(x_BCHW).logits.square().sum())


def test_weights_rest_and_scores_train() -> None:
    model, _ = pair("small", 8)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {f"body.scores.{i}" for i in range(len(scored_body(model).scores))}
    model.train()(torch.rand(4, 3, 8, 8, dtype=torch.float64)).logits.sum().backward()
    assert all(p.grad is None for p in scored_body(model).dense.parameters())
    assert all(s.grad is not None and s.grad.any() for s in scored_body(model).scores)


class Plain(nn.Module):
    """Two convolutions and a head, over the channels of which the tests say what each is worth."""

    def __init__(self, width: int):
        super().__init__()
        self.first = conv(3, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        x_BCHW = F.relu(self.norm(self.first(x_BCHW)))
        return self.head(x_BCHW.mean((2, 3)))


def colours() -> tuple[Tensor, Tensor]:
    """Images of three classes: red, green or blue."""
    y_B = torch.arange(48) % 3
    x_BCHW = 0.1 * torch.rand(48, 3, 4, 4)
    x_BCHW[torch.arange(48), y_B] += 0.8
    return x_BCHW, y_B


def hand_made() -> Network:
    """Channels 1, 2 and 4 see a colour each, 0 and 3 are dead though they are read by far the most.

    A sixth sees red too, but little of it reaches the head.
    """
    body, small = Plain(6), Plain(3)
    with torch.no_grad():
        body.first.weight.zero_()
        body.head.weight.zero_()
        body.head.bias.zero_()
        for channel, colour in ((1, 0), (2, 1), (4, 2), (5, 0)):
            body.first.weight[channel, colour] = 1.0
            body.head.weight[colour, channel] = 3.0
        body.head.weight[0, 5] = 0.1
        body.head.weight[:, [0, 3]] = 9.0
        body.norm.weight[[0, 3]] = 0.0
    dense, rest = (
        Network(net, None, normalize=Normalize(), num_experts=1) for net in (body, small)
    )
    return scored(dense, rest, 4)


def test_first_scores_are_the_norms_of_what_is_read_scaled() -> None:
    model = hand_made()
    body = scored_body(model)
    body.start_scores()
    (scores_D,) = body.scores
    norm_D = body.dense.head.weight.norm(dim=0)  # type: ignore[union-attr,operator]
    want_D = math.sqrt(6 / 6) * norm_D / norm_D.max()
    torch.testing.assert_close(scores_D.data, want_D)


def test_dead_channels_are_dropped_however_large_the_weights_that_read_them() -> None:
    torch.manual_seed(0)
    model, (x_BCHW, y_B) = hand_made(), colours()
    body = scored_body(model)
    body.start_scores()
    assert (body.mask()[1:7] > 0).nonzero().flatten().tolist() == [0, 1, 3], "by magnitude alone"
    optimizer = torch.optim.SGD(body.scores, lr=0.3, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_BCHW).logits, y_B).backward()
        optimizer.step()
    assert (body.mask()[1:7] > 0).nonzero().flatten().tolist() == [1, 2, 4]
    small = Plain(3).eval()
    body.prune_into(small)
    with torch.no_grad():
        x_BCHW = model.normalize(x_BCHW)
        assert small(x_BCHW, Routing()).argmax(1).tolist() == y_B.tolist()


# What is refused


def test_scores_that_are_not_finite_are_refused_with_the_layer() -> None:
    model = hand_made()
    body = scored_body(model)
    body.scores[0].data[2] = float("nan")
    with pytest.raises(ValueError, match="scores of first are not finite"):
        body.prune_into(Plain(3))


class Empty(Plain):
    """Keeps no channel of its first layer."""

    def __init__(self) -> None:
        super().__init__(1)
        self.first.weight = nn.Parameter(torch.empty(0, 3, 1, 1))


class Renamed(Plain):
    def __init__(self) -> None:
        super().__init__(3)
        self.other = self.first
        del self.first


@pytest.mark.parametrize(
    ("small", "message"),
    [
        (Empty(), r"first must keep 1 to 6 channels, got 0"),
        (Plain(7), r"first must keep 1 to 6 channels, got 7"),
        (Renamed(), r"first is a layer of one of the two nets only"),
    ],
)
def test_small_net_that_is_no_part_of_the_dense_one_is_refused(
    small: nn.Module, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ScoredBody(Plain(6), small, 4)


def test_layers_that_are_added_must_keep_as_many_channels() -> None:
    def make(stem: int, second: int) -> nn.Module:
        return Residual(
            stem=conv(3, stem),
            before=nn.BatchNorm2d(stem),
            first=conv(stem, 4),
            norm=nn.BatchNorm2d(4),
            second=conv(4, second, 1),
            head=nn.Linear(stem, 4),
        )

    with pytest.raises(ValueError, match="second keeps 3 channels, but stem, to which it is added"):
        ScoredBody(make(4, 4), make(2, 3), 4)


def test_body_of_another_wiring_is_refused_when_it_is_filled() -> None:
    body = scored_body(hand_made())
    with pytest.raises(ValueError, match=r"first\.weight keeps \(3, 3, 1, 1\), the small net want"):
        body.prune_into(Plain(4))
