"""A network trained on the answers of another, to make attacked images on (arXiv:1602.02697).

Shapes: B images of a batch, CHW channels and sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.backbones.small import Small
from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.attacks.pgd import PGD
from pipeline.data.augmentation import to_float
from pipeline.data.splits import Images, Share, Source
from pipeline.optimization.losses import cross_entropy_per_image

UPDATES = 1_000
BATCH = 64


def train_substitute(
    model: Network,
    images: Source,
    attack: PGD,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    updates: int = UPDATES,
    tell: Callable[[int, int, float], object] = lambda done, of, seconds: None,
) -> Network:
    """Train a small dense network to give the labels that ``model`` gives; returns it frozen.

    Each update takes images as they are and moved by one step of the whole radius against the
    substitute itself, which is where it has to learn the model's boundary (Jacobian-based
    augmentation, Papernot et al., 2017, arXiv:1602.02697, section 4.2). Only labels are asked for:
    no scale, noise or saturation of the logits is in the way. The true labels are not used.

    Args:
        model: Frozen, on ``device``.
        images: Training images.
        attack: Gives radius and norm.
        num_classes: Of the labels.
        seed: Of weights and order.
        updates: Of a batch of at most 64 images and as many moved ones.
        tell: Called with updates done, of how many, and seconds so far.
    """
    step = PGD(eps=attack.eps, norm=attack.norm, step_size=attack.eps, steps=1, start="clean")
    batches, net, began = forever(images, seed), None, time.monotonic()
    for done, pixels_BCHW in enumerate(islice(batches, updates), 1):
        x_BCHW = to_float(pixels_BCHW).to(device)
        y_B = labels(model, x_BCHW)
        if net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = Small(num_experts=1).build(num_classes, x_BCHW.shape[-1]).to(device)
            optimizer = torch.optim.Adam(net.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
        moved = step(against(net.eval(), y_B), x_BCHW)
        both, asked = torch.cat([x_BCHW, moved]), torch.cat([y_B, labels(model, moved)])
        loss = F.cross_entropy(net.train()(both).logits, asked)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        tell(done, updates, time.monotonic() - began)
    assert net is not None
    return fold(net.eval())


def forever(images: Source, seed: int) -> Iterator[Tensor]:
    """Yield pixels of batches, epoch after epoch."""
    size = min(BATCH, len(images))
    for epoch in count():
        share = Share(seed=seed, epoch=epoch, first=0, batch_size=size)
        yield from (pixels_BCHW for pixels_BCHW, _ in images.batches(share))


def against(net: Network, y_B: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the cross-entropy that an attack climbs."""
    return lambda x: cross_entropy_per_image(net(x).logits, y_B)


def agreement(one: Network, two: Network, images: Images, device: torch.device) -> float:
    """Share of images to which two networks on a device give the same label."""
    same = 0
    for low in range(0, len(images), BATCH):
        x_BCHW = to_float(images.pixels_NCHW[low : low + BATCH]).to(device)
        same += int((labels(one, x_BCHW) == labels(two, x_BCHW)).sum())
    return same / len(images)


@torch.no_grad()
def labels(model: Network, x_BCHW: Tensor) -> Tensor:
    """Ask the deployed model, (B,)."""
    found_B: Tensor = model(x_BCHW).logits.argmax(1)
    return found_B
