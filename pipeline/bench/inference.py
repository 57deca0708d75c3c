"""Inference: the folded mixture against every expert masked, and against the dense net."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing_stats import load
from pipeline.bench.compiled import CompiledDispatch
from pipeline.bench.masked import masked
from pipeline.bench.race import Benchmark, RaceResult, Variant
from pipeline.bench.settings import Settings, settle

OURS, MASKED = "mixture, ours", "mixture, masked"
DENSE, DENSE_FOLDED = "dense, plain", "dense, our eval path"
OURS_COMPILED, DENSE_COMPILED = "mixture, compiled", "dense, compiled"
SETTLED = 32  # images at least that running statistics are taken from


def inference(settings: Settings) -> Benchmark:
    """Classify one batch without gradients."""
    settled_NCHW, _ = settings.images(SETTLED)
    x_BCHW = settled_NCHW[: settings.batch]
    nhwc_BCHW = channels_last(x_BCHW)
    mixture, dense = (settle(net, settled_NCHW) for net in (settings.mixture(), settings.dense()))
    slow, fast = masked(mixture), fold(relaid(mixture))
    dense_fast = fold(relaid(copy.deepcopy(dense)))

    def calm(model: Network, images_BCHW: Tensor) -> Variant:
        return Variant(torch.no_grad()(lambda: model(images_BCHW)))

    @torch.no_grad()
    def notes() -> list[str]:
        found, wanted = fast(nhwc_BCHW), slow(x_BCHW)
        gap = (found.logits - wanted.logits).abs().max() / wanted.logits.abs().max()
        return [
            f"sorted and masked logits differ by {gap:.0e} of the largest",
            f"load of the experts: {shares(found.route, settings.num_experts)}",
        ]

    variants = {
        OURS: calm(fast, nhwc_BCHW),
        MASKED: calm(slow, x_BCHW),
        DENSE: calm(dense, x_BCHW),
        DENSE_FOLDED: calm(dense_fast, nhwc_BCHW),
    }
    if settings.compiled:
        for name, model in ((OURS_COMPILED, mixture), (DENSE_COMPILED, dense)):
            variants[name] = compiled_variant(model, nhwc_BCHW, settings.precision)

    def ratios(outcome: RaceResult) -> list[str]:
        return [
            f"{name}: {1 / outcome.speedup(name, DENSE):.2f} of the plain dense net's time"
            for name in variants
        ]

    return Benchmark(
        title=f"inference on {settings.batch} images",
        variants=variants,
        notes=notes,
        turns=3,
        compare=ratios,
    )


def compiled_variant(model: Network, x_BCHW: Tensor, precision: str) -> Variant:
    """Compile router and pathways, run them once, and count the work on their uncompiled twin.

    Raises:
        ValueError: The network has no pathways to compile.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cast_BCHW = channels_last(x_BCHW.to(dtype))
    plain = CompiledDispatch(model, dtype, None)
    fast = CompiledDispatch(model, dtype, torch.compile)

    @torch.inference_mode()
    def work() -> Tensor:
        return fast.logits(cast_BCHW)

    work()
    return Variant(work, trial=torch.no_grad()(lambda: plain.logits(cast_BCHW)))


def channels_last(x_BCHW: Tensor) -> Tensor:
    """Lay images out as training and evaluation do."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def relaid(model: Network) -> Network:
    """Lay weights out as training and evaluation do, in place."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def shares(route: Tensor, num_experts: int) -> str:
    """Write the load of the experts."""
    return ", ".join(f"{share:.2f}" for share in load(route, num_experts))
