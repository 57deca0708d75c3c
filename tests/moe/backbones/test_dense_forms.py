"""Dense nets of the full width against torchvision's, and against their papers' formulas.

Shapes: B images, C channels, HW sides, K classes.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import densenet121, resnet18
from torchvision.models.vgg import cfgs, make_layers

from moe.backbones import BACKBONES
from moe.backbones.densenet import Transition
from moe.network import Network
from moe.routing import Route, Routing

CLASSES = 11
ALONE = Routing(Route.top1(torch.zeros(2, 1)))


def dense(name: str, size: int, ratio: float = 1.0) -> Network:
    """Make a dense net in eval mode whose BatchNorms all differ from the identity."""
    torch.manual_seed(0)
    model = BACKBONES[name](num_experts=1, ratio=ratio).build(CLASSES, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def lend(body: nn.Module, twin: nn.Module) -> None:
    """Copy weights and statistics in the order in which the layers were made."""
    for own, other in (
        (list(body.parameters()), list(twin.parameters())),
        (list(body.buffers()), list(twin.buffers())),
    ):
        assert len(own) == len(other)
        for source, target in zip(own, other, strict=True):
            target.copy_(source)


@torch.no_grad()
@pytest.mark.parametrize(("name", "theirs"), [("resnet18", resnet18), ("densenet", densenet121)])
def test_dense_net_above_64_px_is_torchvisions(name: str, theirs: type[nn.Module]) -> None:
    model, twin = dense(name, 96), theirs(num_classes=CLASSES).eval()
    lend(model.body, twin)
    found, want = model(images(96)).logits, twin(model.normalize(images(96)))
    assert float(want.std()) > 0.01
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 96])
def test_vgg_has_torchvisions_convolutions_and_pooling_and_its_own_head(size: int) -> None:
    model = dense("vgg16", size)
    features = make_layers(cfgs["D"], batch_norm=True).eval()
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            layer.bias = None
    lend(model.body.stages, features)  # type: ignore[arg-type]
    x_BC = F.adaptive_avg_pool2d(features(model.normalize(images(size))), 2).flatten(1)
    for layer in (*model.body.hidden, model.body.head):  # type: ignore[misc]
        x_BC = layer(x_BC if layer is model.body.hidden[0] else x_BC.relu())  # type: ignore[index]
    found = model(images(size)).logits
    torch.testing.assert_close(found, x_BC, rtol=1e-4, atol=1e-4 * float(x_BC.abs().max()))


def weight(layer: nn.Module) -> Tensor:
    """Filters of a plain convolution or of the only expert."""
    own = layer.conv if hasattr(layer, "conv") else layer
    return own.weight if isinstance(own, nn.Conv2d) else own.weight_FCRR  # type: ignore


def rectified(x_BCHW: Tensor, norm: nn.Module) -> Tensor:
    mean, var, scale = (
        getattr(norm, name).view(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight")
    )
    normed_BCHW = (x_BCHW - mean) / (var + 1e-5).sqrt() * scale + norm.bias.view(1, -1, 1, 1)
    return normed_BCHW.clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize(("size", "side"), [(32, 32), (64, 32)])
def test_wide_resnet_is_the_pre_activation_net_of_its_paper(size: int, side: int) -> None:
    model = dense("wrn28_10", size, 1 / 16).double()
    body = model.body
    x_BCHW = F.conv2d(
        model.normalize(images(size).double()), weight(body.stem), stride=size // side, padding=1
    )
    assert x_BCHW.shape[2] == side
    for number, block in enumerate(body.blocks):
        first, stride = number % 4 == 0, 2 if number in (4, 8) else 1
        h_BCHW = rectified(x_BCHW, block.norm1)
        y_BCHW = F.conv2d(h_BCHW, weight(block.conv1), stride=stride, padding=1)
        y_BCHW = rectified(y_BCHW, block.conv1.norm)
        y_BCHW = F.conv2d(y_BCHW, weight(block.conv2), padding=1)
        if first:
            x_BCHW = F.conv2d(h_BCHW, weight(block.shortcut), stride=stride)
        assert (block.shortcut is not None) == first
        x_BCHW = y_BCHW + x_BCHW
    assert x_BCHW.shape[1:] == (40, side // 4, side // 4)
    want = body.head(rectified(x_BCHW, body.norm).mean((2, 3)))
    torch.testing.assert_close(model(images(size).double()).logits, want)


def test_wide_resnets_groups_see_28_14_and_7_pixels_at_224() -> None:
    with torch.device("meta"):
        model = dense("wrn28_10", 224)
        sides = []
        x_BCHW = model.body.stem(images_of_no_numbers())
        for block in model.body.blocks:
            x_BCHW = block(x_BCHW, ALONE)
            sides.append(x_BCHW.shape[2])
    assert sides == [28] * 4 + [14] * 4 + [7] * 4


def images_of_no_numbers() -> Tensor:
    return torch.zeros(2, 3, 224, 224, device="meta")


@torch.no_grad()
def test_densenet_40_is_the_net_of_its_paper() -> None:
    model = dense("densenet", 32, 0.25).double()
    body = model.body
    x_BCHW = F.conv2d(model.normalize(images(32).double()), weight(body.stem), padding=1)
    widths = [x_BCHW.shape[1]]
    for layer in body.blocks:
        if isinstance(layer, Transition):
            y_BCHW = F.conv2d(rectified(x_BCHW, layer.norm), weight(layer.conv))
            x_BCHW = F.avg_pool2d(y_BCHW, 2)
        else:
            y_BCHW = F.conv2d(rectified(x_BCHW, layer.norm1), weight(layer.conv1))
            y_BCHW = rectified(y_BCHW, layer.conv1.norm)
            assert y_BCHW.shape[1] == 12
            y_BCHW = F.conv2d(y_BCHW, weight(layer.conv2), padding=1)
            x_BCHW = torch.cat([x_BCHW, y_BCHW], 1)
        widths.append(x_BCHW.shape[1])
    want_widths = [6, *range(9, 25, 3), 12, *range(15, 31, 3), 15, *range(18, 34, 3)]
    assert widths == want_widths
    want = body.head(rectified(x_BCHW, body.norm).mean((2, 3)))
    torch.testing.assert_close(model(images(32).double()).logits, want)
