"""Upcycling of a dense network into a mixture: each expert starts as a copy of the dense layer.

Sparse upcycling (Komatsuzaki et al., ICLR 2023, arXiv:2212.05055). The function is preserved where
the gates sum to one: AdvMoE's hard gate of 1, and token routing with ``renormalize``; with raw
top-k gates it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.network import Network, is_router_parameter
from moe.token_network import TokenNetwork

DENSE_NAMES = {
    ".mlp.up_EHD": ".up.weight",
    ".mlp.up_bias": ".up.bias",
    ".mlp.down_EDH": ".down.weight",
    ".mlp.down_bias": ".down.bias",
}
"""Weights of a mixture of MLPs, and of the MLP whose place it takes."""
PRESERVED = 1e-5  # change of logits up to which a function counts as kept: rounding
PROBES = 16  # random images on which the change of the outputs is measured


def dense_name(name: str) -> str:
    """Name the weight of the dense network that a mixture's weight is copied from."""
    for ours, dense in DENSE_NAMES.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + dense
    return name


def every_expert(name: str, dense: Tensor, stack: Tensor) -> Tensor:
    """Repeat a dense weight or bias for each expert of a stack; as it is where it is no stack."""
    if stack.shape[1:] == dense.shape and stack.dim() == 3:
        return dense.expand_as(stack)
    flat = name.endswith((".mlp.up_bias", ".mlp.down_bias"))
    if not flat and not (name.endswith("weight_FCRR") and stack.shape[1:] == dense.shape[1:]):
        return dense
    copies, rest = divmod(len(stack), len(dense))
    return dense if rest else dense.repeat(copies, *[1] * (dense.dim() - 1))


@torch.no_grad()
def upcycle(dense: Network, mixture: Network, image_size: int) -> None:
    """Fill a mixture from a dense network of the same backbone; its router stays as it was made.

    Works for mixtures of MLPs, and for mixture convolutions from S-Dense of AdvMoE
    (``num_experts=1`` at the same ratio). There the shared layers of the mixture may be wider than
    those of the dense net: what reads their further channels starts at zero, which keeps the
    function and lets them learn; a shortcut that the dense net has as an identity starts as one.

    Raises:
        ValueError: The source is no dense network, a weight is missing or of another shape, or the
            mixture cannot compute what the dense network does.
    """
    if dense.num_experts != 1:
        raise ValueError(f"upcycling starts from a dense network, got {dense.num_experts} experts")
    source, convolutions = dense.state_dict(), not isinstance(mixture, TokenNetwork)
    own = {n: t for n, t in mixture.state_dict().items() if not is_router_parameter(n)}
    if left := source.keys() - {dense_name(name) for name in own}:
        raise ValueError(f"the mixture has no {min(left)}: its layers are others at this ratio")
    for name, target in own.items():
        if (found := source.get(dense_name(name))) is not None:
            fill(name, found, target)
        elif ".shortcut." in name:
            start_identity(name, target)
        else:
            raise ValueError(f"the dense network has no {dense_name(name)}")
    if convolutions and relative_change(dense, mixture, image_size) > PRESERVED:
        raise ValueError("the mixture cannot compute what the dense network does at this ratio")


def fill(name: str, dense: Tensor, target: Tensor) -> None:
    """Copy a dense weight into each expert, or into the first channels of a wider layer.

    Raises:
        ValueError: The shapes do not allow it.
    """
    whole = every_expert(name, dense, target)
    if whole.shape == target.shape:
        target.copy_(whole)
        return
    experts = max(1, len(target) // len(dense)) if name.endswith("weight_FCRR") else 1
    wider = target.dim() in (1, 4) and all(
        a >= b for a, b in zip(target[: len(target) // experts].shape, dense.shape, strict=True)
    )
    if not wider or target.shape[2:] != dense.shape[2:]:
        raise ValueError(
            f"{dense_name(name)} has shape {tuple(dense.shape)}, which is no copy for each "
            f"expert of {tuple(target.shape)}: size, ratio, classes or image size differ"
        )
    for own in target.chunk(experts):
        rows = own[: len(dense)]
        if target.dim() == 4:
            rows.zero_()
            rows = rows[:, : dense.shape[1]]
        rows.copy_(dense)


def start_identity(name: str, target: Tensor) -> None:
    """Make a 1x1 shortcut with BatchNorm compute its first channels, in eval mode."""
    if name.endswith(("conv.weight", "weight_FCRR")):
        target.zero_()
        for own in target.chunk(len(target) // min(target.shape[:2])):
            channels = torch.arange(min(own.shape[:2]))
            own[channels, channels] = 1.0
    elif name.endswith("norm.weight"):
        target.fill_((1 + 1e-5) ** 0.5)
    elif name.endswith("running_var"):
        target.fill_(1.0)
    else:
        target.zero_()


@torch.no_grad()
def relative_change(before: Network, after: Network, image_size: int) -> float:
    """Return ``|z' - z| / |z|`` of the logits of two networks in eval mode on random images."""
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.rand(PROBES, 3, image_size, image_size, generator=generator)
    found = []
    for model in (before, after):
        was_training = model.training
        found.append(model.eval()(x_BCHW.to(next(model.parameters()))).logits)
        model.train(was_training)
    return float((found[1] - found[0].to(found[1])).norm() / found[0].norm().clamp(min=1e-12))
