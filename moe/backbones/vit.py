"""Vision transformers (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929), dense.

Shapes: B images, CHW channels and sides, T tokens (patches and the class token), D width, N heads,
K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.backbones.base import RouterScope
from moe.backbones.blocks import assemble, check, scaled
from moe.network import Network
from moe.routing import Routing, at_least_float32
from moe.weight_files import check_weights

Size = Literal["tiny", "small"]
HEAD, MLP = 64, 4  # width of one head; width of the hidden layer over that of the tokens


class Form(NamedTuple):
    """How large a transformer is."""

    depth: int
    heads: int


FORMS: dict[Size, Form] = {"tiny": Form(12, 3), "small": Form(12, 6)}
"""ViT-Ti and ViT-S (Touvron et al., ICML 2021, arXiv:2012.12877, table 1): widths 192 and 384."""
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
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, MLP * width), nn.Linear(MLP * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        y_BTD: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))
        return y_BTD


class TransformerBody(nn.Module):
    """Patches, a class token, learned positions, blocks, and a linear map of the class token."""

    def __init__(self, form: Form, width: int, patch: int, image_size: int, num_classes: int):
        super().__init__()
        self.grid = image_size // patch
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token_11D = nn.Parameter(torch.empty(1, 1, width))
        self.position_1TD = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, form.heads) for _ in range(form.depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, num_classes)
        for parameter in (self.token_11D, self.position_1TD):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor, routing: Routing) -> Tensor:
        x_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BTD = torch.cat([self.token_11D.expand(x_BTD.shape[0], -1, -1), x_BTD], 1)
        x_BTD = x_BTD + self.position_1TD
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BK: Tensor = self.head(self.norm(x_BTD[:, 0]))
        return at_least_float32(logits_BK)

    @torch.no_grad()
    def take_timm(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the weights of timm's ``vit_*_patch*`` of the same size, by their names.

        Positions of another grid are interpolated (bicubic, the class token's kept). Where they
        have no classifier, or one for another number of classes, ours is left as it was made.

        Raises:
            ValueError: A weight is missing, unknown, or of another shape; names it and both shapes.
        """
        own, left = self.state_dict(), set(weights)
        for name, target in own.items():
            theirs = timm_name(name)
            if name.startswith("head.") and rows_of(weights.get(theirs)) != len(target):
                left.discard(theirs)
                continue
            if theirs not in weights:
                raise ValueError(f"weights hold no {theirs}")
            left.remove(theirs)
            found = weights[theirs]
            if name == "position_1TD" and found.shape[1] != target.shape[1]:
                found = _resampled(found, self.grid)
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


@dataclass(frozen=True, kw_only=True)
class ViT:
    """ViT-Ti or ViT-S with a class token, without dropout.

    Attributes:
        num_experts: 1: a dense net, or an expert of ``backbone=mixture``.
        ratio: Width over the full width, in (0, 1]; the number of heads stays.
        router_scope: There is no router.
        size: ``tiny`` (5.7 M parameters, 12 blocks 192 wide) or ``small`` (22 M, 384 wide).
        patch: Side of a patch in pixels; 0: 4 up to 32 px, 8 up to 64 px, 16 above.
        pixels: Mean and deviation that pixels are normalized by: ``data``: those of CIFAR up to 64
            px and of ImageNet above; ``half``: 0.5 and 0.5, as timm's ``augreg`` weights want it.
        weights: A safetensors file with timm's weights of the same size to start from; empty: none.
            Only the start of a run reads it, on every worker.
        weights_sha256: Of that file, found when ``weights`` is set and this is not.

    Raises:
        ValueError: A setting is out of its range.
    """

    num_experts: int = 1
    ratio: float = 1.0
    router_scope: RouterScope = "shared"
    size: Size = "tiny"
    patch: int = 0
    pixels: Literal["data", "half"] = "data"
    weights: str = ""
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        check(self.num_experts, self.ratio, self.router_scope)
        if self.num_experts != 1:
            raise ValueError(
                f"num_experts must be 1 for vit, got {self.num_experts}; backbone=mixture "
                "backbone.expert=vit makes whole transformers experts"
            )
        for key, valid in (("size", tuple(FORMS)), ("pixels", ("data", "half"))):
            if (value := getattr(self, key)) not in valid:
                raise ValueError(f"{key} must be one of {', '.join(valid)}, got {value!r}")
        if self.patch < 0:
            raise ValueError(f"patch must be at least 0, got {self.patch}")
        if self.weights and not self.weights_sha256:
            check_weights(self.weights)
            with Path(self.weights).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            object.__setattr__(self, "weights_sha256", found)

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
        usual = "imagenet" if image_size > 64 else "cifar"
        return assemble(
            TransformerBody(form, width, patch, image_size, num_classes),
            nn.Identity,  # never asked for: there is one expert
            num_experts=1,
            router_scope="shared",
            statistics="half" if self.pixels == "half" else usual,
        )
