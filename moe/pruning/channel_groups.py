"""Which channels of a body stand or fall together: found by running it with marked channels.

Shapes: R probing rows, P layers, F features that a module reads, D channels that a layer writes,
CHW channels and sides.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers import MoEConv2d
from moe.routing import Route, Routing

Layer = nn.Conv2d | MoEConv2d | nn.Linear
Norm = nn.BatchNorm1d | nn.BatchNorm2d

ALWAYS = 0  # position of what no layer writes, the colours of the image: never pruned


@dataclass(frozen=True)
class Group:
    """Channels written by the same layers; several where their outputs are added.

    Attributes:
        layers: Names of these layers.
        width: Channels, of each of them.
        first: Position of the first channel; the others follow.
    """

    layers: tuple[str, ...]
    width: int
    first: int

    @property
    def span(self) -> slice:
        """Where its channels are."""
        return slice(self.first, self.first + self.width)


@dataclass(frozen=True)
class Coupling:
    """The channels of a body, each with a position from 1 on, and who reads and writes them.

    Attributes:
        groups: In the order of their first layers.
        reads: By name of a layer or norm: the position of each feature it reads, int64 (F,), 0 for
            those that no layer writes.
        writes: By name of a layer: the position of each channel it writes, int64 (D,).
    """

    groups: tuple[Group, ...]
    reads: Mapping[str, Tensor]
    writes: Mapping[str, Tensor]


def weight_of(layer: Layer) -> Tensor:
    """The weight of a layer, outputs first."""
    return layer.weight_FCRR if isinstance(layer, MoEConv2d) else layer.weight


def layers_of(body: nn.Module) -> dict[str, Layer]:
    """The layers of a body that mix channels, by name."""
    return {name: m for name, m in body.named_modules() if isinstance(m, Layer)}


def couple(body: nn.Module, image_size: int) -> Coupling:
    """Find which layers write the channels that each layer and norm reads.

    Every layer is replaced by one that puts out zeros, and NaN in the channels that are marked in
    a row of the batch. NaN passes through everything that works channel by channel (BatchNorm,
    activations, pooling, sums, concatenation), so what arrives at a reader tells where it comes
    from: P rows mark one layer each, two rows a bit mark the channels whose number has that bit,
    and those whose number has it not. One pass of a batch this small finds residual streams and
    concatenations of any body, without a word from it.

    Raises:
        ValueError: A module cannot be pruned, or mixes channels outside of a layer; names it.
    """
    layers = layers_of(body)
    _check_modules(body)
    width = max(len(weight_of(layer)) for layer in layers.values())
    bits = max(1, (width - 1).bit_length())
    seen: dict[str, Tensor] = {}
    probe = copy.deepcopy(body).eval()
    for row, (name, layer) in enumerate(layers.items()):
        parent, _, child = name.rpartition(".")
        marks_RD = _marks(row, len(layers), bits, len(weight_of(layer)))
        setattr(probe.get_submodule(parent), child, _Marker(name, layer, marks_RD, seen))
    for name, module in probe.named_modules():
        if isinstance(module, Norm):
            module.register_forward_pre_hook(
                lambda _, given, name=name: _note(seen, name, given[0])
            )
    rows = len(layers) + 2 * bits
    with torch.no_grad():
        blank = next(body.parameters()).new_zeros(rows, 3, image_size, image_size)
        probe(blank, Routing(Route.top1(blank.new_zeros(rows, 1))))
    names = list(layers)
    if idle := [name for name in names if name not in seen]:
        raise ValueError(f"cannot prune: {idle[0]} does not run")
    sources = {name: _decode(name, seen_RF, names) for name, seen_RF in seen.items()}
    return _join({name: len(weight_of(layer)) for name, layer in layers.items()}, sources)


def _check_modules(body: nn.Module) -> None:
    for name, module in body.named_modules():
        if not isinstance(module, Layer | Norm) and module._parameters:
            raise ValueError(f"cannot prune {name}, a {type(module).__name__}")
        if isinstance(module, MoEConv2d) and module.num_experts != 1:
            raise ValueError(f"cannot prune {name}: num_experts must be 1")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise ValueError(f"cannot prune {name}: groups must be 1, got {module.groups}")


def _marks(row: int, layers: int, bits: int, width: int) -> Tensor:
    marks_RD = torch.zeros(layers + 2 * bits, width, dtype=torch.bool)
    marks_RD[row] = True
    for bit in range(bits):
        has_D = (torch.arange(width) >> bit) % 2 == 1
        marks_RD[layers + 2 * bit], marks_RD[layers + 2 * bit + 1] = has_D, ~has_D
    return marks_RD


def _note(seen: dict[str, Tensor], name: str, x: Tensor) -> None:
    if name in seen:
        raise ValueError(f"cannot prune: {name} runs twice in one pass")
    seen[name] = x.isnan().flatten(2).any(2).cpu() if x.dim() > 2 else x.isnan().cpu()


class _Marker(nn.Module):
    """Stands for a layer: notes what it reads, and writes its marks in the shape of its output."""

    def __init__(self, name: str, layer: Layer, marks_RD: Tensor, seen: dict[str, Tensor]):
        super().__init__()
        self.name, self.marks_RD, self.seen = name, marks_RD, seen
        self.weight = torch.empty_like(weight_of(layer), device="meta")  # for the shape alone
        self.linear = isinstance(layer, nn.Linear)
        self.stride = getattr(layer, "stride", 1)
        self.padding = getattr(layer, "padding", 0)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        _note(self.seen, self.name, x)
        marks_RD = self.marks_RD.to(x.device)
        if self.linear:
            return x.new_zeros(marks_RD.shape).masked_fill(marks_RD, float("nan"))
        shape = F.conv2d(x.to("meta"), self.weight, None, self.stride, self.padding).shape
        return x.new_zeros(shape).masked_fill(marks_RD[:, :, None, None], float("nan"))


Source = tuple[int, tuple[str, ...]]  # of a feature: a channel's number, and the layers that write


def _decode(name: str, seen_RF: Tensor, names: list[str]) -> list[Source]:
    marked_FP, bits_FN = seen_RF[: len(names)].T, seen_RF[len(names) :].T
    found: list[Source] = []
    for marked_P, bits_N in zip(marked_FP.tolist(), bits_FN.tolist(), strict=True):
        writers = tuple(itertools.compress(names, marked_P))
        has, lacks = bits_N[0::2], bits_N[1::2]
        if any(map(operator.and_, has, lacks)):
            raise ValueError(
                f"cannot prune: different channels of {' and '.join(writers)} are mixed before "
                f"they reach {name}"
            )
        found.append((sum(1 << bit for bit, is_set in enumerate(has) if is_set), writers))
    return found


def _join(widths: Mapping[str, int], sources: Mapping[str, list[Source]]) -> Coupling:
    """Unite the layers that write a feature together, and number the channels of each union."""
    united = {name: {name} for name in widths}
    for writers in {writers for found in sources.values() for _, writers in found}:
        joint = set().union(*(united[name] for name in writers))
        united |= dict.fromkeys(joint, joint)
    groups: list[Group] = []
    first: dict[str, int] = {}
    start = ALWAYS + 1
    for name, width in widths.items():
        leader, *others = (other for other in widths if other in united[name])
        if leader == name:
            groups.append(Group((leader, *others), width, start))
            start += width
        elif width != widths[leader]:
            raise ValueError(
                f"cannot prune: {name} writes {width} channels, {leader}, to which they are "
                f"added, {widths[leader]}"
            )
        first[name] = first.get(leader, groups[-1].first)
    reads = {
        name: torch.tensor([first[by[0]] + channel if by else ALWAYS for channel, by in found])
        for name, found in sources.items()
    }
    writes = {name: first[name] + torch.arange(width) for name, width in widths.items()}
    return Coupling(tuple(groups), reads, writes)
