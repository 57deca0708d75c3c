"""Ten updates of each algorithm on made-up images: ``python -m tests.golden.record [NAME ...]``.

The command writes the losses to ``tests/golden/<name>.json``, which a test reproduces. Run it when
numbers are meant to change, and say in the commit why. In float64, so that another CPU's order of
summation stays below the tolerance.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moe.backbones import Backbone
from moe.backbones.blocks import BasicBlock, assemble, mixture, plain
from moe.backbones.dual import DualNetworks
from moe.backbones.resnet import ResidualBody
from moe.network import Network
from moe.routers import ImageRouter
from pipeline.algorithms import ALGORITHMS
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.sparse import Sparse
from pipeline.checkpoint import build_model
from pipeline.config import Config
from pipeline.data.augmentation import to_float
from pipeline.data.splits import epoch_order
from pipeline.data.synthetic import Synthetic
from pipeline.optim import advance, build_optimizers, moment
from pipeline.optimization.state import TrainState, partition_of
from pipeline.seeding import Noise, generator_at

FOLDER = Path(__file__).parent
UPDATES, BATCH = 10, 16

Curves = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Two:
    """Two residual blocks of 8 and 16 channels, apart from the backbones, whose widths may change.

    Two experts have these widths each; a dense net has them times its ratio.
    """

    num_experts: int = 2
    ratio: float = 1.0
    router_scope: Literal["shared", "per_layer"] = "shared"

    def build(self, num_classes: int, image_size: int) -> Network:
        """Make the network, which is the same for any ``image_size``."""
        make, a, b = mixture(self.num_experts, "shared"), int(8 * self.ratio), int(16 * self.ratio)
        blocks = [BasicBlock(a, a, 1, make, plain), BasicBlock(a, b, 2, make, plain)]
        return assemble(
            ResidualBody(plain(3, a, 3, 1), blocks, b, num_classes, False),
            lambda: ImageRouter(2, blocks=1, widths=(4, 8)),
            num_experts=self.num_experts,
            router_scope="shared",
        )


@dataclass(frozen=True, kw_only=True)
class Pair(DualNetworks):
    """A dual model of two such mixtures."""

    standard: Backbone = Two()
    robust: Backbone = Two()


def curves(name: str) -> Curves:
    """Train a small mixture for ten updates; return each loss, in nats per image.

    An algorithm with stages goes through all of them; that which prunes ends with a dense net of
    half the width.
    """
    dataset, algorithm = Synthetic(classes=4, size=8, train_images=256), ALGORITHMS[name]()
    two: Backbone = Two()
    if isinstance(algorithm, Sparse):
        two = Two(num_experts=1, ratio=0.5)
    if isinstance(algorithm, JTDMoE):
        two = Pair()
    config = Config(lr=0.02, epochs=1, dataset=dataset, backbone=two, algorithm=algorithm)
    images = dataset.load(0).train
    torch.manual_seed(0)
    state = TrainState(
        build_model(config, 0).double(), {}, partition=partition_of(config.algorithm)
    )
    state.optimizers = build_optimizers(config, state)
    order_N, found, stage = epoch_order(len(images), 0, 0), Curves(), 0
    for step in range(UPDATES):
        if (now := moment(config, 0, step, UPDATES).stage) != stage:
            advance(config, state, now)
            stage = now
        rows_B = order_N[step * BATCH :][:BATCH]
        state.noise = Noise(generator_at("cpu", "golden", step))
        x_BCHW = to_float(images.pixels_NCHW[rows_B]).double()
        losses = algorithm.step(state, x_BCHW, images.labels_N[rows_B])
        state.check(step)
        for key, loss in losses.items():
            found.setdefault(key, []).append(round(loss.item(), 4))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or ALGORITHMS:
        text = json.dumps(curves(chosen), indent=1)
        (FOLDER / f"{chosen}.json").write_text(text + "\n", encoding="utf-8")
        print(chosen, text)
