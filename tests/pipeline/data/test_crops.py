"""Views against torchvision's own transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.data.crops import CentreCrop, RandomCrop, random_box
from pipeline.data.splits import stream


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(50, 40), (40, 90), (7, 200), (300, 9), (33, 33)])
def test_boxes_are_those_of_torchvision(width: int, height: int) -> None:
    """Strips as well: there nothing fits, and the centre is taken."""
    transform = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    for seed in range(40):
        torch.manual_seed(seed)
        want = transform.make_params([torch.empty(3, height, width)])
        found = random_box(width, height, 0.2, torch.Generator().manual_seed(seed))
        assert found == (want["top"], want["left"], want["height"], want["width"])


def test_a_random_crop_is_torchvisions_of_that_box() -> None:
    source = picture(60, 45)
    box = random_box(60, 45, 0.08, stream("crop", 1, 2, 77))
    want = v2.functional.resized_crop(source, *box, [16, 16], antialias=True)
    found = RandomCrop(16, 0.08, 1, 2)(source, 77)
    np.testing.assert_array_equal(found, np.asarray(want).transpose(2, 0, 1))


def test_a_crop_follows_seed_epoch_and_row_and_nothing_else() -> None:
    source, whole = picture(60, 45), RandomCrop(16, 0.08, 1, 2)
    torch.rand(5)
    np.testing.assert_array_equal(whole(source, 7), RandomCrop(16, 0.08, 1, 2)(source, 7))
    others = (whole(source, 8), RandomCrop(16, 0.08, 1, 3)(source, 7))
    for other in (*others, RandomCrop(16, 0.08, 2, 2)(source, 7)):
        assert (other != whole(source, 7)).any()


def test_a_crop_of_everything_is_the_whole_picture() -> None:
    source = picture(40, 40)
    boxes = {random_box(40, 40, 1.0, torch.Generator().manual_seed(seed)) for seed in range(99)}
    assert (0, 0, 40, 40) in boxes
    assert all(h * w > 0.9 * 1600 for _, _, h, w in boxes)
    assert RandomCrop(40, 1.0, 0, 0)(source, 0).shape == (3, 40, 40)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (64, 64), (30, 500)])
def test_the_centre_is_torchvisions_at_224(width: int, height: int) -> None:
    source = picture(width, height)
    want = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(source)
    np.testing.assert_array_equal(CentreCrop(224)(source, 0), np.asarray(want).transpose(2, 0, 1))
    assert CentreCrop(64)(source, 0).shape == (3, 64, 64)
