"""Ten updates of each algorithm on made-up images: ``python -m tests.golden.record [NAME ...]``.

The command writes the losses to ``tests/golden/<name>.json``, which a test reproduces. Run it when
numbers are meant to change, and say in the commit why. In float64, so that another CPU's order of
summation stays below the tolerance.
"""

import json
import sys
from pathlib import Path

import torch

from moe.backbones.parts import BasicBlock, assemble, mixture, plain
from moe.backbones.resnet import ResidualBody
from moe.network import Network
from moe.routers import ImageRouter
from pipeline.algorithms import ALGORITHMS
from pipeline.config import Config
from pipeline.data.loading import epoch_order, to_float
from pipeline.data.synthetic import Synthetic
from pipeline.optim import build_optimizers
from pipeline.seeding import Noise, generator_at
from pipeline.state import TrainState

FOLDER = Path(__file__).parent
UPDATES, BATCH = 10, 16

Curves = dict[str, list[float]]


def network() -> Network:
    """Two experts in two residual blocks, apart from the backbones, whose widths may change."""
    make = mixture(2, "shared")
    blocks = [BasicBlock(8, 8, 1, make, plain), BasicBlock(8, 16, 2, make, plain)]
    return assemble(
        ResidualBody(plain(3, 8, 3, 1), blocks, 16, 4, False),
        lambda: ImageRouter(2, blocks=1, widths=(4, 8)),
        num_experts=2,
        router_scope="shared",
    )


def curves(name: str) -> Curves:
    """Train a small mixture for ten updates; return each loss, in nats per image."""
    images = Synthetic(classes=4, size=8, train_images=256).load(0).train
    torch.manual_seed(0)
    state = TrainState(network().double(), {})
    state.optimizers = build_optimizers(Config(lr=0.02), state)
    algorithm, order_N, found = ALGORITHMS[name](), epoch_order(len(images), 0, 0), Curves()
    for step in range(UPDATES):
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
