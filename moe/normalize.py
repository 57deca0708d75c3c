"""Normalization of pixels as a part of the model, so that eps is in pixel units everywhere."""

import torch
from torch import Tensor, nn

STATISTICS = {  # mean and standard deviation per channel, of the training pixels in [0, 1]
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]: of no data, usual for transformers
}


class Normalize(nn.Module):
    """Map pixels in [0, 1] to ``(x - mean) / std`` per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: str = "cifar"):
        super().__init__()
        mean, std = STATISTICS[statistics]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - self.mean) / self.std
