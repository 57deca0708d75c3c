"""Vision transformers (arXiv:2010.11929), dense and with mixtures of MLPs (V-MoE).

Dosovitskiy et al., ICLR 2021; mixtures: Riquelme et al., NeurIPS 2021, arXiv:2106.05974, under
attack: Puigcerver et al., NeurIPS 2022, arXiv:2210.10253.

Shapes: B images, CHW channels and sides, T tokens (patches and the class token), D width, N heads,
K classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.base import RouterScope
from moe.backbones.blocks import scaled
from moe.moe_mlp import MoEMlp, TokenMixture
from moe.network import Network
from moe.normalize import Normalize
from moe.routing import Routing, at_least_float32
from moe.token_network import TokenNetwork
from moe.token_routing import AuxiliaryWeights, RouterKind, TokenRouting
from moe.upcycling import dense_name, every_expert
from moe.valid_fields import Count, NonNegative, Positive, Ratio, Whole, check_fields
from moe.weight_files import check_weights

Size = Literal["micro", "tiny", "small", "base"]
HEAD = 64  # width of one head


class Form(NamedTuple):
    """How large a transformer is."""

    depth: int
    heads: int


FORMS: dict[Size, Form] = {
    "micro": Form(6, 2),
    "tiny": Form(12, 3),
    "small": Form(12, 6),
    "base": Form(12, 12),
}
"""ViT-Ti, ViT-S and ViT-B (Touvron et al., ICML 2021, arXiv:2012.12877, table 1): widths 192, 384
and 768; ``micro``, 128 wide, is ours."""
Pooling = Literal["token", "mean"]
PATCHES = ((32, 4), (64, 8))
"""Image sides, and the patch up to there: 64 tokens at 32 and 64 px, as ours; above, the usual 16,
196 tokens at 224 px."""


class Attention(nn.Module):
    """Multi-head self-attention with one linear map for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = self.qkv(x_BTD).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed_BNTd = F.scaled_dot_product_attention(query, key, value)
        y_BTD: Tensor = self.out(mixed_BNTd.transpose(1, 2).flatten(2))
        return y_BTD


class TransformerBlock(nn.Module):
    """Attention and an MLP of two layers, each behind a LayerNorm and with a shortcut.

    Args:
        width, heads: Of the attention.
        hidden: Width of the MLP's hidden layer.
        tokens: T.
        mixture: Settings of the mixture of MLPs that takes the place of the one; None: dense.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, tokens: int, mixture: TokenMixture | None = None
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        if mixture is None:
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = None if mixture is None else MoEMlp(width, hidden, tokens, mixture)

    def forward(self, x_BTD: Tensor, routing: Routing | TokenRouting) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        z_BTD = self.norm2(x_BTD)
        if self.mlp is None:
            y_BTD: Tensor = x_BTD + self.down(F.gelu(self.up(z_BTD)))
        else:
            y_BTD = x_BTD + self.mlp(z_BTD, routing)
        return y_BTD


class TransformerBody(nn.Module):
    """Patches, learned positions, blocks, and a linear map of the class token or the tokens' mean.

    Args:
        mixtures: Settings of each block's mixture of MLPs, None where the block is dense.
        hidden: Width of the MLPs' hidden layers.
        pooling: ``token``: a class token is added and classified; ``mean``: the patches' mean.
    """

    def __init__(
        self,
        mixtures: Sequence[TokenMixture | None],
        heads: int,
        width: int,
        hidden: int,
        patch: int,
        image_size: int,
        num_classes: int,
        pooling: Pooling = "token",
    ):
        super().__init__()
        self.grid, self.pooling = image_size // patch, pooling
        self.patches = nn.Conv2d(3, width, patch, patch)
        own = 1 if pooling == "token" else 0
        self.tokens = own + self.grid**2
        self.token_11D = nn.Parameter(torch.empty(1, 1, width)) if own else None
        self.position_1TD = nn.Parameter(torch.empty(1, self.tokens, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, hidden, self.tokens, mixture) for mixture in mixtures
        )
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, num_classes)
        for parameter in (self.token_11D, self.position_1TD):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor, routing: Routing | TokenRouting) -> Tensor:
        x_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        if self.token_11D is not None:
            x_BTD = torch.cat([self.token_11D.expand(x_BTD.shape[0], -1, -1), x_BTD], 1)
        x_BTD = x_BTD + self.position_1TD
        for block in self.blocks:
            x_BTD = block(x_BTD, routing)
        if self.pooling == "mean":
            logits_BK: Tensor = self.head(self.norm(x_BTD).mean(1))
        else:
            logits_BK = self.head(self.norm(x_BTD[:, 0]))
        return at_least_float32(logits_BK)

    @torch.no_grad()
    def take_timm(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the weights of timm's ``vit_*_patch*`` of the same size, by their names.

        Positions of another grid are interpolated (bicubic, the class token's kept). Where they
        have no classifier, or one for another number of classes, ours is left as it was made. A
        mixture gets the MLP in every expert (sparse upcycling, arXiv:2212.05055) and keeps its
        router. Without a class token, theirs and its position are left out.

        Raises:
            ValueError: A weight is missing, unknown, or of another shape; names it and both shapes.
        """
        own, left = self.state_dict(), set(weights)
        if self.pooling == "mean":
            left.discard("cls_token")
        for name, target in own.items():
            theirs = timm_name(name)
            if ".mlp.router." in name:
                continue
            if name.startswith("head.") and rows_of(weights.get(theirs)) != len(target):
                left.discard(theirs)
                continue
            if theirs not in weights:
                raise ValueError(f"weights hold no {theirs}")
            left.remove(theirs)
            found = weights[theirs]
            if name == "position_1TD":
                if found.shape[1] != 1 + self.grid**2:
                    found = _resampled(found, self.grid)
                found = found[:, -self.tokens :]
            if ".mlp." in name:
                found = every_expert(name, found, target)
            if found.shape != target.shape:
                raise ValueError(
                    f"{theirs} has shape {tuple(found.shape)}, want {tuple(target.shape)}: "
                    "size, ratio or patch differ"
                )
            target.copy_(found)
        if left:
            raise ValueError(f"weights hold {sorted(left)[0]}, which this network has not")


def rows_of(tensor: Tensor | None) -> int:
    """Length of a tensor's first axis; 0 for one without axes, or none at all."""
    return len(tensor) if tensor is not None and tensor.dim() else 0


def timm_name(name: str) -> str:
    """Name one of our weights as timm does."""
    name = dense_name(name)
    for ours, theirs in (
        ("token_11D", "cls_token"),
        ("position_1TD", "pos_embed"),
        ("patches.", "patch_embed.proj."),
        (".attention.out.", ".attn.proj."),
        (".attention.", ".attn."),
        (".up.", ".mlp.fc1."),
        (".down.", ".mlp.fc2."),
    ):
        name = name.replace(ours, theirs)
    return name


def _resampled(position_1TD: Tensor, grid: int) -> Tensor:
    """Fit positions of one square grid of patches to another."""
    side = round((position_1TD.shape[1] - 1) ** 0.5)
    if side**2 != position_1TD.shape[1] - 1:
        raise ValueError(
            f"pos_embed must hold the class token and a square grid, got {position_1TD.shape[1]}"
        )
    old_1DHW = position_1TD[:, 1:].transpose(1, 2).reshape(1, -1, side, side).float()
    new_1DHW = F.interpolate(old_1DHW, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([position_1TD[:, :1].float(), new_1DHW.flatten(2).transpose(1, 2)], 1)


def mixture_blocks(placement: str, depth: int) -> list[int]:
    """List the blocks whose MLP is a mixture, from 0.

    ``every_n``: blocks n-1, 2n-1, ...; ``last_n``: the last n odd blocks (arXiv:2106.05974).

    Raises:
        ValueError: The placement is neither, or holds no block.
    """
    parts = re.fullmatch(r"(every|last)_([1-9][0-9]*)", placement)
    if parts is None:
        raise ValueError(f"placement must be every_N or last_N, got {placement!r}")
    count = int(parts[2])
    if parts[1] == "every":
        blocks = list(range(count - 1, depth, count))
    else:
        blocks = list(range(1, depth, 2))[-count:]
    if not blocks or (parts[1] == "last" and count > len(blocks)):
        raise ValueError(f"placement {placement} needs more than {depth} blocks")
    return blocks


@dataclass(frozen=True, kw_only=True)
class ViT:
    """A vision transformer without dropout, dense or with mixtures of MLPs (V-MoE).

    Attributes:
        num_experts: MLPs of each mixture; 1: a dense net, or an expert of ``backbone=mixture``.
        ratio: Width over the full width, in (0, 1]; the number of heads stays.
        router_scope: Not used: the tokens of each mixture layer route for themselves.
        size: ``micro`` (6 blocks 128 wide), ``tiny`` (5.7 M parameters, 12 blocks 192 wide),
            ``small`` (22 M, 384 wide) or ``base`` (86 M, 768 wide).
        patch: Side of a patch in pixels; 0: 4 up to 32 px, 8 up to 64 px, 16 above.
        pixels: Mean and deviation that pixels are normalized by: ``data``: those of CIFAR up to 64
            px and of ImageNet above; ``half``: 0.5 and 0.5, as timm's ``augreg`` weights want it.
        weights: A safetensors file with timm's weights of the same size to start from; empty: none.
            Only the start of a run reads it, on every worker. A mixture is upcycled from it.
        weights_sha256: Of that file, found when ``weights`` is set and this is not.
        pooling: What is classified: the class ``token``, or the ``mean`` of the patches.
        hidden: Width of the MLPs' hidden layer over that of the tokens.
        placement: Which blocks are mixtures: ``every_2``, ``last_2``, ..., see ``mixture_blocks``.
        top_k, router, renormalize, capacity, priority, group, noise_std, identical: See
            ``moe.moe_mlp.TokenMixture``.
        balance: Weight of the auxiliary losses over the released ones (importance and load 0.005
            each; GShard's 0.01 for two experts).
        z_loss: Weight of the router z-loss.

    Raises:
        ValueError: A setting is out of its range.
    """

    num_experts: Count = 1
    ratio: Ratio = 1.0
    router_scope: RouterScope = "shared"
    size: Size = "tiny"
    patch: Whole = 0
    pixels: Literal["data", "half"] = "data"
    weights: str = ""
    weights_sha256: str = ""
    pooling: Pooling = "token"
    hidden: Positive = 4.0
    placement: str = "every_2"
    top_k: int = 1
    router: RouterKind = "top_k"
    renormalize: bool = False
    capacity: NonNegative = 0.0
    priority: bool = False
    group: Count = 8
    noise_std: NonNegative = 1.0
    identical: bool = False
    balance: NonNegative = 1.0
    z_loss: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        mixture_blocks(self.placement, FORMS[self.size].depth)
        if self.num_experts > 1:
            self.mixture()
        if self.weights and not self.weights_sha256:
            check_weights(self.weights)
            with Path(self.weights).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            object.__setattr__(self, "weights_sha256", found)

    def mixture(self) -> TokenMixture:
        """Return the settings of each mixture layer."""
        usual = AuxiliaryWeights()
        return TokenMixture(
            num_experts=self.num_experts,
            top_k=self.top_k,
            router=self.router,
            renormalize=self.renormalize,
            capacity=self.capacity,
            priority=self.priority,
            group=self.group,
            noise_std=self.noise_std,
            identical=self.identical,
            weights=AuxiliaryWeights(
                self.balance * usual.importance,
                self.balance * usual.load,
                self.balance * usual.gshard,
                self.z_loss,
            ),
        )

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network for square images of ``image_size`` pixels, with random weights.

        Raises:
            ValueError: The patches do not fill the image.
        """
        patch = self.patch or next((own for side, own in PATCHES if image_size <= side), 16)
        if image_size % patch:
            raise ValueError(
                f"patch must divide the image's side of {image_size} pixels, got {patch}"
            )
        form = FORMS[self.size]
        width = form.heads * scaled(HEAD, self.ratio)
        places = mixture_blocks(self.placement, form.depth) if self.num_experts > 1 else []
        body = TransformerBody(
            [self.mixture() if block in places else None for block in range(form.depth)],
            form.heads,
            width,
            max(1, round(self.hidden * width)),
            patch,
            image_size,
            num_classes,
            self.pooling,
        )
        usual = "imagenet" if image_size > 64 else "cifar"
        normalize = Normalize("half" if self.pixels == "half" else usual)
        if not places:
            return Network(body, None, normalize=normalize, num_experts=1)
        return TokenNetwork(body, normalize=normalize, tokens=body.tokens)
