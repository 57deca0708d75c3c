"""RandAugment and CutMix against slow definitions; neither depends on the number of workers."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from pipeline.data.augmentation import cutmix, randaugment

CLASSES = 5


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pixels(count: int = 12, side: int = 16) -> Tensor:
    shape = (count, 3, side, side)
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(9))


def mix(x_BCHW: Tensor, y_B: Tensor, probability: float = 0.7, **where: int) -> tuple[Tensor, ...]:
    return cutmix(
        x_BCHW, y_B, probability=probability, num_classes=CLASSES, generator=seeded(), **where
    )


def slow_cutmix(x_BCHW: Tensor, y_B: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Image by image and pixel by pixel, with the draws in the same order."""
    b, _, h, w = x_BCHW.shape
    coin, area, row, column = torch.rand(4, b, generator=seeded())
    mixed, shares_BK = x_BCHW.clone(), torch.zeros(b, CLASSES)
    for i in range(b):
        partner, pasted = i + 1 if i % 2 == 0 else i - 1, 0
        if coin[i] < probability and partner < b:
            half_h = int(h * area[i].sqrt() / 2)  # the box is half_h above and below its centre
            half_w = int(w * area[i].sqrt() / 2)
            for r in range(int(row[i] * h) - half_h, int(row[i] * h) + half_h):
                for c in range(int(column[i] * w) - half_w, int(column[i] * w) + half_w):
                    if 0 <= r < h and 0 <= c < w:
                        mixed[i, :, r, c] = x_BCHW[partner, :, r, c]
                        pasted += 1
        shares_BK[i, y_B[i]] += 1 - pasted / (h * w)
        if pasted:
            shares_BK[i, y_B[partner]] += pasted / (h * w)
    return mixed, shares_BK


@pytest.mark.parametrize("probability", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(40, 3, 8, 8), (7, 1, 6, 11)])
def test_cutmix_equals_a_loop_over_pixels(shape: tuple[int, ...], probability: float) -> None:
    x_BCHW, y_B = torch.rand(shape, generator=seeded(1)), torch.arange(shape[0]) % CLASSES
    mixed, shares_BK = mix(x_BCHW, y_B, probability)
    wanted, wanted_BK = slow_cutmix(x_BCHW, y_B, probability)
    assert torch.equal(mixed, wanted)
    torch.testing.assert_close(shares_BK, wanted_BK, rtol=0, atol=1e-7)
    assert not torch.equal(mixed, x_BCHW)


def test_share_of_a_class_is_the_share_of_pixels_that_show_it() -> None:
    y_B = torch.arange(64) % CLASSES
    x_BCHW = y_B.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)  # every pixel tells its class
    mixed, shares_BK = mix(x_BCHW, y_B, 1.0)
    for image, share_K in zip(mixed, shares_BK, strict=True):
        for label in range(CLASSES):
            assert share_K[label] == (image[0] == label).float().mean()
    assert (shares_BK.sum(1) == 1).all()


def test_box_covers_any_share_of_an_image_evenly_but_for_what_lies_outside() -> None:
    x_BCHW, y_B = torch.zeros(20000, 1, 32, 32), torch.arange(20000) % 2
    shares_BK = mix(x_BCHW, y_B, 1.0)[1]
    pasted_B = 1 - shares_BK[torch.arange(20000), y_B]
    # of a box of side s in [0, 1] around a uniform centre, s - s^2 / 4 lies inside per axis
    s = torch.rand(200000, generator=seeded(3)).sqrt()
    wanted = ((s - s**2 / 4) ** 2).mean()
    assert pasted_B.mean() == pytest.approx(wanted.item(), abs=0.02)
    assert pasted_B.max() > 0.8


def test_share_of_images_that_are_mixed_is_the_probability() -> None:
    x_BCHW = torch.arange(4000.0).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    mixed = mix(x_BCHW, torch.arange(4000) % CLASSES, 0.25)[0]
    share = (mixed != x_BCHW).any(3).any(2).any(1).float().mean()
    assert 0.2 < share < 0.27, "boxes of no pixel are rare"


def augmenter(kind: str) -> Callable[..., Tensor]:
    if kind == "randaugment":
        return lambda part, **where: randaugment(part, generator=seeded(4), **where)
    labels_B = torch.arange(12) % CLASSES
    return lambda part, rank=0, world=1: mix(
        part, labels_B[rank * len(part) :][: len(part)], rank=rank, world=world
    )[0]


@pytest.mark.parametrize("kind", ["randaugment", "cutmix"])
@pytest.mark.parametrize("world", [2, 3, 6])
def test_images_do_not_depend_on_the_number_of_workers(kind: str, world: int) -> None:
    change, images = augmenter(kind), pixels()
    whole, parts = change(images), images.chunk(world)
    joined = [change(part, rank=rank, world=world) for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(joined), whole)
    assert not torch.equal(whole, images)


def test_labels_of_mixed_images_do_not_depend_on_the_number_of_workers() -> None:
    images, y_B = pixels(), torch.arange(12) % CLASSES
    parts = zip(images.chunk(3), y_B.chunk(3), strict=True)
    joined = [mix(x, y, rank=rank, world=3)[1] for rank, (x, y) in enumerate(parts)]
    assert torch.equal(torch.cat(joined), mix(images, y_B)[1])


def test_randaugment_is_that_of_torchvision_seeded_for_each_image() -> None:
    from torchvision.transforms.v2 import RandAugment

    images, wanted = pixels(), []
    seeds = torch.randint(2**62, (12,), generator=seeded(4)).tolist()
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            torch.manual_seed(seed)
            wanted.append(RandAugment()(image))
    found = randaugment(images, generator=seeded(4))
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack(wanted))
    assert not torch.equal(found, randaugment(images, generator=seeded(5)))


def test_randaugment_leaves_the_global_generator_where_it_was() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    randaugment(pixels(2), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError):
        randaugment(pixels(2).float() * 300, generator="none")  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
