"""Every dataset by name. A new one is a file here and a line below."""

from pipeline.data.base import Dataset, OnDisk
from pipeline.data.cifar import Cifar10, Cifar100
from pipeline.data.digits import Digits
from pipeline.data.imagenet import ImageNet
from pipeline.data.synthetic import Synthetic
from pipeline.data.tiny_imagenet import TinyImageNet

DATASETS: dict[str, type[Dataset]] = {
    "digits": Digits,
    "synthetic": Synthetic,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "tiny_imagenet": TinyImageNet,
    "imagenet": ImageNet,
}

__all__ = ["DATASETS", "Dataset", "OnDisk"]
