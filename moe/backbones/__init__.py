"""Every backbone by name. A new one is a file here and a line below."""

from moe.backbones.densenet import DenseNet
from moe.backbones.lipschitz import Lipschitz
from moe.backbones.mixture import NetworkMixture
from moe.backbones.protocols import Backbone as Backbone
from moe.backbones.protocols import RouterScope as RouterScope
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
    "lipschitz": Lipschitz,
}
