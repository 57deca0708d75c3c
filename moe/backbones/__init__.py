"""Every backbone by name. A new one is a file here and a line below."""

from dataclasses import replace
from typing import Any

from moe.backbones.base import Backbone as Backbone
from moe.backbones.base import RouterScope as RouterScope
from moe.backbones.densenet import DenseNet
from moe.backbones.dual import DualNetworks
from moe.backbones.lipschitz import Lipschitz
from moe.backbones.mixture import NetworkMixture
from moe.backbones.resnet import ResNet18
from moe.backbones.small import Small
from moe.backbones.vgg import VGG16
from moe.backbones.vit import ViT
from moe.backbones.wide_resnet import WideResNet

BACKBONES: dict[str, type[Backbone]] = {
    "resnet18": ResNet18,
    "small": Small,
    "wrn28_10": WideResNet,
    "vgg16": VGG16,
    "densenet": DenseNet,
    "vit": ViT,
    "mixture": NetworkMixture,
    "dual": DualNetworks,
    "lipschitz": Lipschitz,
}


def dense_twin(backbone: Any) -> Backbone:
    """Return what a backbone is compared with: one expert of full width, no router.

    Of a dual model that of its robust half.
    """
    if isinstance(backbone, DualNetworks):
        return dense_twin(backbone.robust)
    twin: Backbone = replace(backbone, num_experts=1, ratio=1.0)
    return twin
