"""Whole networks as experts: one call an expert against one call an image."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.backbones import BACKBONES
from moe.backbones.mixture import NetworkMixture
from moe.fold_batchnorm import fold
from moe.mixture_of_networks import Mixture
from pipeline.bench.inference import channels_last, relaid, shares
from pipeline.bench.race import Benchmark, Variant
from pipeline.bench.settings import CLASSES, Settings, settle

OURS, FOLDED = "an expert at a time, ours", "the same, folded"
SINGLE, EVERY = "an image at a time, as released", "every expert on every image"


def mixture(settings: Settings) -> Benchmark:
    """Classify one batch without gradients, by the best expert of each image."""
    x_BCHW = channels_last(settings.images()[0])
    model = made(settings, x_BCHW)
    folded = fold(model)

    @torch.no_grad()
    def notes() -> list[str]:
        found, wanted_BK = model(x_BCHW), image_by_image(model, x_BCHW)
        gap = (found.logits - wanted_BK).abs().max() / wanted_BK.abs().max()
        return [
            f"logits by expert and by image differ by {gap:.0e} of the largest",
            f"load of the experts: {shares(found.route, settings.num_experts)}",
        ]

    return Benchmark(
        title=f"mixture of {settings.num_experts} whole networks on {settings.batch} images",
        variants={
            OURS: Variant(torch.no_grad()(lambda: model(x_BCHW))),
            SINGLE: Variant(torch.no_grad()(lambda: image_by_image(model, x_BCHW))),
            EVERY: Variant(torch.no_grad()(lambda: model.experts_logits(x_BCHW))),
            FOLDED: Variant(torch.no_grad()(lambda: folded(x_BCHW))),
        },
        notes=notes,
        turns=3,
    )


def made(settings: Settings, x_BCHW: Tensor) -> Mixture:
    """Make the mixture from seed 0, with running statistics of these images and all experts."""
    torch.manual_seed(0)
    net = NetworkMixture(
        num_experts=settings.num_experts,
        ratio=settings.ratio,
        expert=BACKBONES[settings.backbone](num_experts=1, ratio=1.0),  # type: ignore[call-arg]
        gate="hard",
        top_k=1,
        mix="logits",
    )
    model = net.build(CLASSES, settings.image_size).to(settings.device)
    assert isinstance(model, Mixture)
    for expert in relaid(model).body.children():
        settle(expert, x_BCHW)  # type: ignore[arg-type]
    return model.eval()


def image_by_image(model: Mixture, x_BCHW: Tensor) -> Tensor:
    """Call the expert of each image on that image alone; the router sees the batch. (B, K)."""
    experts = model.experts
    chosen = model.router_scores(x_BCHW).argmax(1).tolist()
    rows = [experts[e](x_BCHW[i : i + 1]).logits for i, e in enumerate(chosen)]
    return torch.cat(rows)
