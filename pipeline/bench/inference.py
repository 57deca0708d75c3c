"""Inference: the folded mixture against every expert masked, and against the dense net."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from moe.fold_batchnorm import fold
from moe.network import Network
from moe.routing_stats import load
from pipeline.bench.masked import masked
from pipeline.bench.race import Benchmark, Variant
from pipeline.bench.settings import Settings, settle

OURS, MASKED = "mixture, ours", "mixture, masked"
DENSE, DENSE_FOLDED = "dense, plain", "dense, our eval path"


def inference(settings: Settings) -> Benchmark:
    """Classify one batch without gradients."""
    x_BCHW, _ = settings.images()
    nhwc_BCHW = channels_last(x_BCHW)
    mixture, dense = settle(settings.mixture(), x_BCHW), settle(settings.dense(), x_BCHW)
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

    return Benchmark(
        title=f"inference on {settings.batch} images",
        variants={
            OURS: calm(fast, nhwc_BCHW),
            MASKED: calm(slow, x_BCHW),
            DENSE: calm(dense, x_BCHW),
            DENSE_FOLDED: calm(dense_fast, nhwc_BCHW),
        },
        notes=notes,
        turns=3,
    )


def channels_last(x_BCHW: Tensor) -> Tensor:
    """Lay images out as training and evaluation do."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def relaid(model: Network) -> Network:
    """Lay weights out as training and evaluation do, in place."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def shares(route: Tensor, num_experts: int) -> str:
    """Write the load of the experts."""
    return ", ".join(f"{share:.2f}" for share in load(route, num_experts))
