"""Named runs. Each is a function whose docstring is its lab label: paper, command, expectation.

The cells of the paper's grid are made by ``pipeline.presets.paper_grid``, and write their labels
themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moe.backbones import Backbone
from moe.backbones.dual import DualNetworks
from moe.backbones.mixture import NetworkMixture
from moe.backbones.resnet import ResNet18
from moe.backbones.small import Small
from moe.backbones.vit import ViT
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.pgd_training import PGDTraining
from pipeline.algorithms.rt_er import RTER, Robustify
from pipeline.algorithms.standard import Standard
from pipeline.algorithms.trades import Trades
from pipeline.algorithms.upcycled_adv_moe import UpcycledAdvMoE
from pipeline.attacks.pgd import PGD
from pipeline.config import Config
from pipeline.data.cifar import Cifar10
from pipeline.data.digits import Digits
from pipeline.data.imagenet import ImageNet
from pipeline.data.tiny_imagenet import TinyImageNet
from pipeline.measures import Evaluation
from pipeline.presets.paper_grid import Cell, cells


def quickstart() -> Config:
    """AdvMoE on scikit-learn's digits, two workers, no download.

    ``python -m pipeline.train``. Ours, from no paper: it shows that everything works. Seen once
    (seed 0, 359 test images, eps 0.1): SA 98.3, RA under PGD-50 88.3, worst case 83.6.
    """
    attack = PGD(eps=0.1, step_size=0.06, steps=2, start="gaussian")
    return Config(
        name="quickstart",
        dataset=Digits(),
        backbone=Small(),
        algorithm=AdvMoE(router_loss="pseudo_label", attack=attack),
        evaluation=Evaluation(eps=0.1, step_size=0.025, steps=50),
        epochs=12,
        batch_size=64,
        workers=2,
        lr=0.05,
    )


def adv_moe_cifar10_small() -> Config:
    """AdvMoE on CIFAR-10 with a small backbone: the main job at a laptop's size.

    ``python -m pipeline.train adv_moe_cifar10_small workers=2``. Ours, from no paper. In bf16,
    which wants a CPU with AMX or AVX512-BF16, or a GPU.
    Seen once (seed 0, 17,100 training and 8,000 test images of a subset): SA 49.1, RA under PGD-50
    30.3, worst case 26.1; 15 minutes on 2 cores of an EPYC (Zen 5), of which the attacks at the end
    took 6.
    """
    return Config(
        name="adv_moe_cifar10_small",
        dataset=Cifar10(validation=0.05, pad=2),
        backbone=Small(),
        algorithm=AdvMoE(router_loss="pseudo_label", aim="ce", beta=9.0),
        epochs=14,
        batch_size=128,
        precision="bf16",
        lr=0.15,
        router_lr=0.02,
        schedule="cyclic",
        router_schedule="cyclic",
    )


def upcycled_adv_moe_cifar10_small() -> Config:
    """AdvMoE on CIFAR-10 from one dense pathway, experts at home with animals and vehicles.

    ``python -m pipeline.train upcycled_adv_moe_cifar10_small workers=2``. Ours, from no paper: the
    best mixture of a comparison of three epochs and one seed, where it is 1.6 points above AdvMoE
    and 0.95 below a dense net of its cost in the worst case. Of ResNet-18 and the other backbones:
    ``pipeline.grid algorithm=upcycled_adv_moe``. Not run to the end by us.
    """
    single = adv_moe_cifar10_small()
    algorithm = UpcycledAdvMoE(router_loss="pseudo_label", homes="superclass", aim="ce", beta=9.0)
    return replace(single, name="upcycled_adv_moe_cifar10_small", algorithm=algorithm)


def adv_moe_cifar10_resnet18() -> Config:
    """AdvMoE on CIFAR-10 with ResNet-18, two experts of half the width (arXiv:2308.10110).

    ``python -m pipeline.train adv_moe_cifar10_resnet18``. The settings of the released code:
    SGD 0.1, cosine, 100 epochs, batch 128, 2 attack steps of 5/255. The paper claims 1 to 4 points
    more robust accuracy than the dense net at less than half its cost; its table could not be had.
    Not run to the end by us: about 2.2 s an update on 2 CPU cores.
    """
    return Config(
        name="adv_moe_cifar10_resnet18", dataset=Cifar10(), backbone=ResNet18(), algorithm=AdvMoE()
    )


def rt_er_cifar10_small() -> Config:
    """RT-ER on CIFAR-10 with four narrow experts, each a whole network.

    ``python -m pipeline.train rt_er_cifar10_small``; ``algorithm=standard`` and
    ``algorithm=pgd_training`` train the same mixture without an attack, and without the experts'
    term. Ours, from no paper: a small net at a quarter of its width is an expert, the attacks of
    training have 3 steps. In bf16; judged on 2,000 test images, since a dual model of two such
    mixtures has 16 pairs of experts to be forced.
    """
    return Config(
        name="rt_er_cifar10_small",
        dataset=Cifar10(validation=0.05, pad=2, test_images=2000),
        backbone=_four(Small(num_experts=1, ratio=1.0), ratio=0.25),
        algorithm=RTER(attack=PGD(step_size=4 / 255, steps=3)),
        epochs=8,
        batch_size=128,
        precision="bf16",
        lr=0.15,
        router_lr=0.001,
        schedule="cyclic",
        router_schedule="cyclic",
    )


def jtdmoe_cifar10_small() -> Config:
    """JTDMoE on CIFAR-10: two mixtures as in ``rt_er_cifar10_small``, trained in turn.

    ``python -m pipeline.train jtdmoe_cifar10_small``. Ours, from no paper: alpha is 0.7, above the
    half that a certificate needs, and each image's second expert alone is made robust.
    """
    return _joint(rt_er_cifar10_small(), "jtdmoe_cifar10_small", robustify="second")


def rt_er_cifar10_resnet18() -> Config:
    """RT-ER on CIFAR-10 with four ResNet-18 as experts (ICML 2025, arXiv:2502.06832).

    ``python -m pipeline.train rt_er_cifar10_resnet18``. The paper's settings: 130 epochs, batch
    512, PGD-10 of 2/255 within 8/255, beta 6; of the released code: Adam, rates of 5e-5 to 1e-4.
    Top-1 as there, but with a router that trains. It reports SA 77.81, RA 69.09 (PGD-50) and RA
    under AutoAttack 54.36. Cost: 0.56 GMAC per image; training about 27 GMAC per image and epoch
    (two attacks of 10 steps, three images through an expert), 45,000 images. How long that takes
    on a GPU is unknown; not run to the end by us.
    """
    return Config(
        name="rt_er_cifar10_resnet18",
        dataset=Cifar10(),
        backbone=_four(ResNet18(num_experts=1, ratio=1.0)),
        algorithm=RTER(),
        epochs=130,
        **_ADAM,
    )


def jtdmoe_cifar10_resnet18() -> Config:
    """JTDMoE on CIFAR-10: two mixtures of four ResNet-18 (ICML 2025, arXiv:2502.06832).

    ``python -m pipeline.train jtdmoe_cifar10_resnet18``. Settings as in ``rt_er_cifar10_resnet18``,
    every expert made robust as in the released code; the paper's alpha in training and its results
    are unknown to us, 0.7 is ours. Cost: 1.1 GMAC per image; training about 73 GMAC per image and
    epoch. How long that takes on a GPU is unknown; not run to the end by us.
    """
    return _joint(rt_er_cifar10_resnet18(), "jtdmoe_cifar10_resnet18")


def rt_er_tiny_imagenet_vit_s() -> Config:
    """RT-ER on Tiny-ImageNet with four ViT-S as experts (ICML 2025, arXiv:2502.06832).

    ``python -m pipeline.train rt_er_tiny_imagenet_vit_s``, with
    ``backbone.expert.weights=FILE.safetensors`` from ImageNet weights as the released code does,
    which enlarges the images to 224 px; here they are 64 px and patches 8. Of the released code:
    PGD-10 of 2/255 within 2/255, batch 512, 200 epochs, Adam, rates of 5e-5 to 1e-4. The paper's
    results on Tiny-ImageNet are unknown to us, and so is the time on a GPU; not run to the end.
    """
    attack = PGD(eps=2 / 255, step_size=2 / 255, steps=10)
    return Config(
        name="rt_er_tiny_imagenet_vit_s",
        dataset=TinyImageNet(),
        backbone=_four(ViT(size="small")),
        algorithm=RTER(attack=attack),
        evaluation=Evaluation(eps=2 / 255, step_size=0.5 / 255),
        epochs=200,
        **_ADAM,
    )


def jtdmoe_tiny_imagenet_vit_s() -> Config:
    """JTDMoE on Tiny-ImageNet: two mixtures of four ViT-S (ICML 2025, arXiv:2502.06832).

    ``python -m pipeline.train jtdmoe_tiny_imagenet_vit_s``, from ImageNet weights with
    ``backbone.standard.expert.weights=FILE`` and ``backbone.robust.expert.weights=FILE``. Settings
    as in ``rt_er_tiny_imagenet_vit_s``, every expert made robust; alpha 0.7 is ours. The paper's
    results are unknown to us, and so is the time on a GPU; not run to the end by us.
    """
    return _joint(rt_er_tiny_imagenet_vit_s(), "jtdmoe_tiny_imagenet_vit_s")


def vmoe_quickstart() -> Config:
    """A small V-MoE on scikit-learn's digits by TRADES, two workers, no download.

    ``python -m pipeline.train vmoe_quickstart``. Ours, from no paper: four experts in every second
    of six blocks, one per token, patches of 2 px; 160 test images, since a route of tokens is
    attacked in eight ways. Seen once (seed 0): SA 92.5, RA under PGD-50 72.5, worst case 70.6, in 2
    min 48 s on 2 cores of an EPYC (Zen 5).
    """
    attack = PGD(eps=0.1, step_size=0.05, steps=2, start="gaussian")
    return Config(
        name="vmoe_quickstart",
        dataset=Digits(test_images=160),
        backbone=ViT(size="micro", ratio=0.5, patch=2, num_experts=4),
        algorithm=Trades(beta=2.0, attack=attack),
        evaluation=Evaluation(eps=0.1, step_size=0.025, steps=50),
        epochs=12,
        workers=2,
        **_V_MOE | {"lr": 2e-3, "batch_size": 32},
    )


def vmoe_cifar10_small() -> Config:
    """A V-MoE of 6 blocks on 10,000 images of CIFAR-10 by PGD training, two workers.

    ``python -m pipeline.train vmoe_cifar10_small``. Ours, from no paper: eight experts of a ViT of
    width 64, one per token, in every second block; 64 patches of 4 px. Its dense twin of equal MACs
    is ``backbone.num_experts=1``, that of equal parameters ``backbone.num_experts=1
    backbone.hidden=18`` (``python -m pipeline.study compute`` trains all three). Seen once
    (seed 0): SA 34.7, RA under PGD-50 21.0, worst case 17.0; 19 minutes on 2 cores of an EPYC (Zen
    5) with other jobs.
    """
    return Config(
        name="vmoe_cifar10_small",
        dataset=Cifar10(validation=0.05, pad=2, train_images=10000, test_images=300),
        backbone=ViT(size="micro", ratio=0.5, num_experts=8),
        algorithm=PGDTraining(attack=PGD(step_size=4 / 255, steps=3)),
        epochs=12,
        workers=2,
        **_V_MOE,
    )


def vmoe_tiny_imagenet_s() -> Config:
    """A V-MoE of ViT-S on Tiny-ImageNet by PGD training.

    ``python -m pipeline.train vmoe_tiny_imagenet_s``. Ours, from no paper: eight experts, two per
    token, in every second block; 64 patches of 8 px. How long it takes on a GPU is unknown; not
    run to the end by us.
    """
    return Config(
        name="vmoe_tiny_imagenet_s",
        dataset=TinyImageNet(),
        backbone=ViT(size="small", num_experts=8, top_k=2),
        algorithm=PGDTraining(attack=PGD(eps=4 / 255, step_size=2 / 255, steps=3)),
        evaluation=Evaluation(eps=4 / 255, step_size=1 / 255),
        epochs=100,
        batch_size=512,
        precision="bf16",
        **{key: value for key, value in _V_MOE.items() if key != "batch_size"},
    )


def vmoe_imagenet_b16() -> Config:
    """V-MoE-B/16 on ImageNet, fine-tuned as in the released code (arXiv:2210.10253).

    ``python -m pipeline.train vmoe_imagenet_b16 backbone.weights=FILE.safetensors``. Eight experts,
    two per token, in every second block, capacity 1.5 over groups of 8 images while training: the
    paper's fine-tuning and attack settings as far as they are released. Its models are private, so
    the start is a dense ViT-B/16 in timm's names, upcycled; rate, length and batch are ours. Not
    run to the end by us.
    """
    return Config(
        name="vmoe_imagenet_b16",
        dataset=ImageNet(),
        backbone=ViT(size="base", num_experts=8, top_k=2, capacity=1.5, pixels="half"),
        algorithm=Standard(),
        evaluation=Evaluation(eps=4 / 255, step_size=1 / 255),
        epochs=8,
        batch_size=512,
        precision="bf16",
        lr=0.003,
        weight_decay=0.0,
        warmup_epochs=0.5,
        clip_norm=10.0,
    )


_V_MOE: dict[str, Any] = {
    "batch_size": 64,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "lr": 1e-3,
    "warmup_epochs": 1.0,
    "clip_norm": 1.0,
}
_ADAM: dict[str, Any] = {
    "batch_size": 512,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "lr": 1e-4,
    "schedule": "triangular",
    "router_schedule": "triangular",
}


def _four(expert: Backbone, ratio: float = 1.0) -> NetworkMixture:
    return NetworkMixture(expert=expert, num_experts=4, ratio=ratio, gate="hard", top_k=1)


def _joint(single: Config, name: str, robustify: Robustify = "all") -> Config:
    halves = DualNetworks(standard=single.backbone, robust=single.backbone, alpha=0.7)
    attack = single.algorithm.attack  # type: ignore[attr-defined]
    algorithm = JTDMoE(robustify=robustify, attack=attack)
    return replace(single, name=name, backbone=halves, algorithm=algorithm)


BY_HAND = (
    quickstart,
    adv_moe_cifar10_small,
    upcycled_adv_moe_cifar10_small,
    adv_moe_cifar10_resnet18,
    rt_er_cifar10_small,
    jtdmoe_cifar10_small,
    rt_er_cifar10_resnet18,
    jtdmoe_cifar10_resnet18,
    rt_er_tiny_imagenet_vit_s,
    jtdmoe_tiny_imagenet_vit_s,
    vmoe_quickstart,
    vmoe_cifar10_small,
    vmoe_tiny_imagenet_s,
    vmoe_imagenet_b16,
)
PRESETS: dict[str, Callable[[], Config]] = {preset.__name__: preset for preset in BY_HAND}
PRESETS |= {cell.name: cell for cell in cells() if cell.name not in PRESETS}


def headline(name: str) -> str:
    """Say in one line what a preset is."""
    preset = PRESETS[name]
    return preset.headline if isinstance(preset, Cell) else label(name).splitlines()[0]


def label(name: str) -> str:
    """Return a preset's lab label; that of a cell of the grid counts its cost, in seconds."""
    preset = PRESETS[name]
    return preset.label() if isinstance(preset, Cell) else inspect.cleandoc(preset.__doc__ or "")
