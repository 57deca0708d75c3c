"""Channel pruning whose scores learn by the training loss, in the manner of HYDRA.

HYDRA (Sehwag et al., NeurIPS 2020, arXiv:2002.10509) scores single weights; here whole channels
are scored, so that what remains is a smaller dense network. Channels that are added together share
a score, see ``moe.pruning.channel_groups``.

Shapes: D channels of a group, N channels of the whole body (and one for what is never pruned), F
features that a layer reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe.layers import MoEConv2d
from moe.network import Network
from moe.pruning.channel_groups import Coupling, Layer, couple, layers_of, weight_of
from moe.routing import Routing

SPREAD = 6  # the constant of HYDRA's first scores, as in Kaiming's uniform initialization


def top_mask(scores_D: Tensor, keep: int) -> Tensor:
    """One for the ``keep`` highest scores, zero for the others; the gradient passes straight.

    ``m = [s among the highest]`` forward and ``dm/ds = 1`` backward, for pruned channels too: the
    mask of HYDRA. Ties go to the lowest index.
    """
    order_D = scores_D.detach().argsort(descending=True, stable=True)
    mask_D = torch.zeros_like(scores_D).scatter(0, order_D[:keep], 1.0)
    return mask_D + (scores_D - scores_D.detach())


class ScoredBody(nn.Module):
    """A dense body whose layers read only the channels that score highest in their group.

    ``y = (W m) conv x``: a mask multiplies the weights by which a layer reads a channel. A pruned
    channel is then read by nobody, whatever BatchNorm, activations, sums or concatenation do to it
    on its way, so this computes what the body without that channel computes. The weights rest;
    the scores learn, and BatchNorm's statistics follow the channels that are kept.

    Args:
        dense: The body to prune; its parameters are frozen.
        small: The body that shall remain: same layers, of any widths up to the dense ones.
        image_size: Pixels of a side.

    Raises:
        ValueError: The bodies do not match, or a layer would keep no channel; names it.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, image_size: int):
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.coupling = coupling = couple(dense, image_size)
        kept = zip(coupling.groups, kept_widths(coupling, small), strict=True)
        self.scored = [(group, keep) for group, keep in kept if keep < group.width]
        self.scores = nn.ParameterList(torch.zeros(group.width) for group, _ in self.scored)
        self.layers = tuple(layers_of(dense))
        for number, name in enumerate(self.layers):  # buffers, to be where the model is
            self.register_buffer(f"reads_{number}", coupling.reads[name], persistent=False)

    def mask(self) -> Tensor:
        """Ones for channels that are kept, in the positions of the coupling (N,)."""
        positions = 1 + sum(group.width for group in self.coupling.groups)
        mask_N = next(self.dense.parameters()).new_ones(positions)
        for (group, keep), scores_D in zip(self.scored, self.scores, strict=True):
            mask_N[group.span] = top_mask(scores_D, keep)
        return mask_N

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        mask_N, weights = self.mask(), {}
        for number, name in enumerate(self.layers):
            layer = self.dense.get_submodule(name)
            assert isinstance(layer, Layer)
            weight, mask_F = weight_of(layer), mask_N[getattr(self, f"reads_{number}")]
            key = "weight_FCRR" if isinstance(layer, MoEConv2d) else "weight"
            weights[f"{name}.{key}"] = weight * mask_F.view(1, -1, *[1] * (weight.dim() - 2))
        logits_BK: Tensor = functional_call(self.dense, weights, (x_BCHW, routing))
        return logits_BK

    @torch.no_grad()
    def start_scores(self) -> None:
        """Score each channel by the weights that read it: HYDRA's scaled initialization.

        ``s_d = sqrt(6 / D) |W_d| / max_d |W_d|``, the norm being over all weights that read channel
        d (HYDRA: of a single weight, with its layer's fan-in for D).
        """
        square_N = torch.zeros_like(self.mask(), device="cpu")  # sums in one order on all replicas
        for name, layer in layers_of(self.dense).items():
            square_F = weight_of(layer).square().transpose(0, 1).flatten(1).sum(1)
            square_N.index_add_(0, self.coupling.reads[name], square_F.cpu())
        for (group, _), scores_D in zip(self.scored, self.scores, strict=True):
            norm_D = square_N[group.span].sqrt()
            top = norm_D.max().clamp(min=1e-12)
            scores_D.copy_(math.sqrt(SPREAD / group.width) * norm_D / top)

    @torch.no_grad()
    def prune_into(self, small: nn.Module) -> None:
        """Copy what is kept, BatchNorm's statistics included, into a body of the small shape.

        Raises:
            ValueError: A score is not finite, or a part of the small body has another shape.
        """
        for (group, _), scores_D in zip(self.scored, self.scores, strict=True):
            if not scores_D.isfinite().all():
                raise ValueError(f"scores of {group.layers[0]} are not finite")
        kept_N = self.mask() > 0.5
        for name, module in small.named_modules():
            own = {**module._parameters, **module._buffers}
            source = self.dense.get_submodule(name)
            for key, target in own.items():
                if target is not None:
                    value = getattr(source, key)
                    for axis, rows in enumerate(self._rows(name, value, kept_N)):
                        value = value.index_select(axis, rows)
                    _check_shape(f"{name}.{key}", value, target)
                    target.copy_(value)

    def _rows(self, name: str, value: Tensor, kept_N: Tensor) -> list[Tensor]:
        """What is kept of each axis that counts channels."""
        reads = self.coupling.reads.get(name)
        writes = self.coupling.writes.get(name)
        axes = [reads] if writes is None else [writes, reads]
        return [
            kept_N[positions.to(kept_N.device)].nonzero().flatten()
            for positions in axes[: value.dim()]
            if positions is not None
        ]


def _check_shape(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise ValueError(
            f"{name} keeps {tuple(value.shape)}, the small net wants {tuple(target.shape)}"
        )


def kept_widths(coupling: Coupling, small: nn.Module) -> list[int]:
    """How many channels of each group remain in a small body with the same layers.

    Raises:
        ValueError: A layer is missing, keeps no channel, or more than there are; names it.
    """
    widths = {name: len(weight_of(layer)) for name, layer in layers_of(small).items()}
    if odd := sorted(widths.keys() ^ coupling.writes.keys()):
        raise ValueError(f"{odd[0]} is a layer of one of the two nets only")
    kept = []
    for group in coupling.groups:
        for name in group.layers:
            if not 1 <= widths[name] <= group.width:
                raise ValueError(
                    f"{name} must keep 1 to {group.width} channels, got {widths[name]}"
                )
            if widths[name] != widths[group.layers[0]]:
                raise ValueError(
                    f"{name} keeps {widths[name]} channels, but {group.layers[0]}, to which it "
                    f"is added, {widths[group.layers[0]]}"
                )
        kept.append(widths[group.layers[0]])
    return kept


def scored(dense: Network, small: Network, image_size: int) -> Network:
    """Join a dense network, which is taken over, with scores that choose the small one in it."""
    body = ScoredBody(dense.body, small.body, image_size)
    return Network(body, None, normalize=dense.normalize, num_experts=1)


def scored_body(model: Network) -> ScoredBody:
    """The body of a network that ``scored`` made."""
    assert isinstance(model.body, ScoredBody)
    return model.body
