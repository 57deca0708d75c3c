"""Corruptions: what each does to images whose corrupted form is known, and what none may do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur as reference_blur

from moe.network import Network
from pipeline.data.splits import Images
from pipeline.measures.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    brightness,
    contrast,
    corrupt,
    corrupted,
    gaussian_blur,
    pixelate,
)

Build = Callable[..., Network]
DRAWS = torch.Generator()


def pictures(count: int, size: int = 8) -> Images:
    draws = torch.Generator().manual_seed(0)
    pixels_NCHW = torch.randint(0, 256, (count, 3, size, size), generator=draws)
    return Images(pixels_NCHW.to(torch.uint8), torch.arange(count) % 4)


def grey(value: int, size: int = 32) -> Images:
    return Images(torch.full((4, 3, size, size), value, dtype=torch.uint8), torch.zeros(4).long())


def distance(images: Images, kind: str, severity: int) -> float:
    moved = corrupt(images, kind, severity, seed=0)
    return float((moved.pixels_NCHW.float() - images.pixels_NCHW.float()).square().mean())


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [8, 32])
def test_severity_grows_and_every_kind_changes_the_images(kind: str, size: int) -> None:
    images = pictures(4, size)
    distances = [distance(images, kind, severity) for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[-1] > distances[0]
    assert distances[-1] > 20


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_image_is_corrupted_the_same_whatever_its_company(kind: str) -> None:
    images = pictures(5)
    every = corrupt(images, kind, 3, seed=1)
    few = corrupt(images.pick(torch.arange(2)), kind, 3, seed=1)
    assert every.pixels_NCHW.dtype == torch.uint8
    assert every.pixels_NCHW.shape == images.pixels_NCHW.shape
    assert torch.equal(every.pixels_NCHW[:2], few.pixels_NCHW)
    assert torch.equal(every.labels_N, images.labels_N)
    assert torch.equal(images.pixels_NCHW, pictures(5).pixels_NCHW), "the images are left alone"


@pytest.mark.parametrize(("kind", "other"), [("gaussian_noise", True), ("contrast", False)])
def test_seed_decides_the_noise_and_nothing_else(kind: str, other: bool) -> None:
    one, two = (corrupt(pictures(3), kind, 2, seed=seed).pixels_NCHW for seed in (0, 1))
    assert torch.equal(one, two) != other


@pytest.mark.parametrize(
    ("kind", "deviations"),
    [
        ("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10)),
        ("shot_noise", tuple((0.5 / photons) ** 0.5 for photons in (500, 250, 100, 75, 50))),
    ],
)
def test_noise_has_the_deviation_of_its_severity(kind: str, deviations: tuple[float, ...]) -> None:
    for severity, deviation in zip(SEVERITIES, deviations, strict=True):
        moved = corrupt(grey(128), kind, severity, seed=0).pixels_NCHW / 255
        assert float(moved.std()) == pytest.approx(deviation, rel=0.05)
        assert float(moved.mean()) == pytest.approx(128 / 255, abs=0.005)


def test_blur_is_that_of_torchvision() -> None:
    x_CHW = pictures(1, 32).pixels_NCHW[0] / 255
    found, inner = gaussian_blur(x_CHW, 0.8, DRAWS), slice(4, -4)
    wanted = reference_blur(x_CHW, [9, 9], [0.8, 0.8])
    torch.testing.assert_close(found[:, inner, inner], wanted[:, inner, inner], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [gaussian_blur, pixelate, contrast])
def test_even_image_stays_as_it_is(change: Callable[..., Tensor]) -> None:
    x_CHW = torch.full((3, 8, 8), 0.3)
    torch.testing.assert_close(change(x_CHW, 0.65, DRAWS), x_CHW)


def test_brightness_raises_the_value_and_keeps_hue_and_saturation() -> None:
    x_CHW = torch.tensor([0.4, 0.2, 0.1]).view(3, 1, 1)
    found = brightness(x_CHW, 0.2, DRAWS).flatten()
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3, 0.15]))
    black = brightness(torch.zeros(3, 1, 1), 0.3, DRAWS)
    torch.testing.assert_close(black, torch.full((3, 1, 1), 0.3))


def test_contrast_draws_towards_the_mean_of_each_channel() -> None:
    x_CHW = torch.tensor([[[0.0, 1.0]], [[0.2, 0.4]], [[0.5, 0.5]]])
    wanted = torch.tensor([[[0.25, 0.75]], [[0.25, 0.35]], [[0.5, 0.5]]])
    torch.testing.assert_close(contrast(x_CHW, 0.5, DRAWS), wanted)


def test_pixelate_by_half_repeats_the_mean_of_four() -> None:
    x_CHW = pictures(1).pixels_NCHW[0] / 255
    found = pixelate(x_CHW, 0.5, DRAWS)
    wanted = x_CHW.view(3, 4, 2, 4, 2).mean((2, 4))
    torch.testing.assert_close(found, wanted.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_model_is_judged_on_every_kind_and_severity(build: Build) -> None:
    model, images = build(ratio=0.125), pictures(6)
    found = corrupted(model, images, seed=0, device=torch.device("cpu"), severities=(1, 5))
    assert set(found) == {(kind, severity) for kind in CORRUPTIONS for severity in (1, 5)}
    for (kind, severity), right_N in found.items():
        moved = corrupt(images, kind, severity, seed=0).pixels_NCHW / 255
        assert torch.equal(right_N, model(moved).logits.argmax(1) == images.labels_N)


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [("fog", 1, "corruption must be of gaussian_noise, "), ("contrast", 6, "in 1 to 5, got 6")],
)
def test_corruption_that_is_not_there_is_refused(kind: str, severity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt(pictures(1), kind, severity, seed=0)


def test_pixelate_weighs_pixels_by_their_share_of_a_box() -> None:
    """Four columns to three boxes of 4/3 of a column each; the middle one is repeated."""
    a, b, c, d = 0.8, 0.2, 0.6, 0.1
    found = pixelate(torch.tensor([a, b, c, d]).expand(1, 4, 4), 0.75, DRAWS)
    boxes = [0.75 * (a + b / 3), 0.75 * (2 * b / 3 + 2 * c / 3), 0.75 * (c / 3 + d)]
    assert sorted(set(found[0, 0].tolist())) == pytest.approx(sorted(boxes))
    assert found[0, 0, [0, 3]].tolist() == pytest.approx([boxes[0], boxes[2]])
