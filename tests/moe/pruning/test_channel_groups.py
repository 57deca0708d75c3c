"""Who reads and writes which channel, on bodies small enough to say it by hand.

Shapes: B images, C channels, HW sides.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones import BACKBONES
from moe.pruning.channel_groups import Coupling, couple, layers_of
from moe.routing import Routing
from tests.conftest import LAYERED


class Body(nn.Module):
    """A body of named modules; the subclasses say how they are wired."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def conv(channels: int, out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


class Chain(Body):
    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        x_BCHW = F.max_pool2d(F.silu(self.norm(self.first(x_BCHW))), 2)
        return self.head(self.second(x_BCHW).relu_().flatten(1))


class Residual(Body):
    """Pre-activation: BatchNorm and ReLU before the convolution, a bare stream."""

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        x_BCHW = x_BCHW + self.second(F.relu(self.norm(self.first(F.relu(self.before(x_BCHW))))))
        return self.head(F.adaptive_avg_pool2d(x_BCHW, 1).flatten(1))


class Dense(Body):
    """Concatenation, and a transition that reads all of it."""

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        x_BCHW = self.stem(x_BCHW)
        x_BCHW = torch.cat([x_BCHW, self.first(F.relu(self.norm(x_BCHW)))], 1)
        x_BCHW = torch.cat([self.second(F.relu(x_BCHW)), x_BCHW], 1)
        return self.head(F.avg_pool2d(self.transition(x_BCHW), 2).mean((2, 3)))


def found(coupling: Coupling) -> list[tuple[tuple[str, ...], int]]:
    return [(group.layers, group.width) for group in coupling.groups]


def positions(coupling: Coupling) -> dict[str, list[int]]:
    return {name: row.tolist() for name, row in coupling.reads.items()}


def test_chain_is_one_group_a_layer_and_a_flattened_map_is_read_pixel_by_pixel() -> None:
    body = Chain(
        first=conv(3, 5), norm=nn.BatchNorm2d(5), second=conv(5, 2), head=nn.Linear(2 * 4, 3)
    )
    coupling = couple(body, 4)
    assert found(coupling) == [(("first",), 5), (("second",), 2), (("head",), 3)]
    assert positions(coupling) == {
        "first": [0, 0, 0],  # the colours
        "norm": [1, 2, 3, 4, 5],
        "second": [1, 2, 3, 4, 5],
        "head": [6] * 4 + [7] * 4,
    }
    assert coupling.writes["head"].tolist() == [8, 9, 10]


def test_channels_that_are_added_share_a_group_in_a_pre_activation_net_too() -> None:
    body = Residual(
        stem=conv(3, 4),
        before=nn.BatchNorm2d(4),
        first=conv(4, 7),
        norm=nn.BatchNorm2d(7),
        second=conv(7, 4, 1),
        head=nn.Linear(4, 2),
    )
    coupling = couple(body, 4)
    assert found(coupling) == [(("stem", "second"), 4), (("first",), 7), (("head",), 2)]
    assert positions(coupling) == {
        "stem": [0, 0, 0],
        "before": [1, 2, 3, 4],
        "first": [1, 2, 3, 4],
        "norm": list(range(5, 12)),
        "second": list(range(5, 12)),
        "head": [1, 2, 3, 4],
    }
    assert coupling.writes["second"].tolist() == [1, 2, 3, 4]


def test_concatenated_channels_stay_apart_and_are_read_in_the_order_of_the_concatenation() -> None:
    body = Dense(
        stem=conv(3, 2),
        norm=nn.BatchNorm2d(2),
        first=conv(2, 3),
        second=conv(5, 1),
        transition=conv(6, 4, 1),
        head=nn.Linear(4, 2),
    )
    coupling = couple(body, 4)
    names = ["stem", "first", "second", "transition", "head"]
    assert found(coupling) == [((n,), w) for n, w in zip(names, (2, 3, 1, 4, 2), strict=True)]
    assert coupling.reads["norm"].tolist() == [1, 2]
    assert coupling.reads["second"].tolist() == [1, 2, 3, 4, 5]
    assert coupling.reads["transition"].tolist() == [6, 1, 2, 3, 4, 5]
    assert coupling.reads["head"].tolist() == [7, 8, 9, 10]


def test_resnet18_has_one_stream_a_stage_and_one_group_a_block() -> None:
    body = BACKBONES["resnet18"](num_experts=1, ratio=0.25).build(4, 32).body
    by_first = {group.layers[0]: group.layers for group in couple(body, 32).groups}
    want = {"stem.conv": ("stem.conv", "blocks.0.conv2.conv", "blocks.1.conv2.conv")}
    for stage in (2, 4, 6):
        first, short = f"blocks.{stage}.conv2.conv", f"blocks.{stage}.shortcut.conv"
        want[first] = (first, short, f"blocks.{stage + 1}.conv2.conv")
    want |= {name: (name,) for i in range(8) for name in [f"blocks.{i}.conv1.conv"]}
    assert by_first == want | {"head": ("head",)}


@pytest.mark.parametrize("name", LAYERED)
def test_every_reader_of_a_backbone_reads_channels_that_its_layers_write(name: str) -> None:
    body = BACKBONES[name](num_experts=1, ratio=0.125).build(4, 32).body.eval()
    coupling = couple(body, 32)
    layers = layers_of(body)
    assert coupling.writes.keys() == layers.keys() <= coupling.reads.keys()
    written = torch.cat(list(coupling.writes.values()))
    last = max(int(row.max()) for row in coupling.writes.values())
    assert set(written.tolist()) == set(range(1, last + 1))
    read = {int(p) for row in coupling.reads.values() for p in row if p}
    assert read == set(range(1, last + 1)) - set(coupling.writes["head"].tolist())


def test_the_body_is_left_as_it_was() -> None:
    model = BACKBONES["small"](num_experts=1, ratio=0.25).build(4, 8).train()
    before = copy.deepcopy(model.state_dict())
    couple(model.body, 8)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.body.training
    assert not any(module._forward_pre_hooks for module in model.modules())


class Mixing(Chain):
    """The mean over channels: nothing of it can be pruned channel by channel."""

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        x_BCHW = self.first(x_BCHW)
        return self.head(self.second(x_BCHW - x_BCHW.mean(1, keepdim=True)).mean((2, 3)))


class Padded(Chain):
    """A narrow stream added to a part of a wider one."""

    before = 0

    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        x_BCHW = self.first(x_BCHW)
        wide = self.second(x_BCHW)
        x_BCHW = F.pad(x_BCHW, (0, 0, 0, 0, self.before, 2 - self.before))
        return self.head((wide + x_BCHW).mean((2, 3)))


class Shifted(Padded):
    before = 1


class Twice(Chain):
    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        return self.head(self.second(self.second(self.first(x_BCHW))).mean((2, 3)))


class Idle(Chain):
    def forward(self, x_BCHW: Tensor, _: Routing) -> Tensor:
        return self.head(self.first(x_BCHW).mean((2, 3)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            Mixing(first=conv(3, 2), second=conv(2, 4), head=nn.Linear(4, 2)),
            "different channels of first are mixed before they reach second",
        ),
        (
            Shifted(first=conv(3, 2), second=conv(2, 4), head=nn.Linear(4, 2)),
            "different channels of first and second are mixed before they reach head",
        ),
        (
            Padded(first=conv(3, 2), second=conv(2, 4), head=nn.Linear(4, 2)),
            "second writes 4 channels, first, to which they are added, 2",
        ),
        (
            Twice(first=conv(3, 4), second=conv(4, 4), head=nn.Linear(4, 2)),
            "second runs twice in one pass",
        ),
        (Idle(first=conv(3, 4), second=conv(4, 4), head=nn.Linear(4, 2)), "second does not run"),
        (
            Chain(first=conv(3, 4), norm=nn.GroupNorm(2, 4), head=nn.Linear(4, 2)),
            "cannot prune norm, a GroupNorm",
        ),
        (
            Chain(first=nn.Conv2d(3, 6, 3, groups=3), head=nn.Linear(6, 2)),
            "cannot prune first: groups must be 1, got 3",
        ),
        (BACKBONES["small"](num_experts=2, ratio=0.25).build(4, 8).body, "num_experts must be 1"),
    ],
)
def test_body_that_cannot_be_pruned_is_refused_with_the_place(
    body: nn.Module, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        couple(body, 8)
