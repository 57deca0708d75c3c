"""Splits, subsets and augmentation against their slow definitions."""

import subprocess
import sys

import pytest
import torch
from torch import Generator, Tensor

from pipeline.data.augmentation import augment, to_float
from pipeline.data.splits import Images, epoch_order, make_splits, stratified_split, take


def images_of(labels_N: Tensor) -> Images:
    """Images whose pixels tell their position."""
    return Images(torch.arange(len(labels_N))[:, None, None, None].expand(-1, 3, 2, 2), labels_N)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_a_split_takes_the_rounded_fraction_of_every_class(fraction: float) -> None:
    labels_N = torch.arange(5).repeat_interleave(torch.tensor([1, 7, 20, 33, 100]))
    labels_N = labels_N[torch.randperm(len(labels_N), generator=seeded(1))]
    kept, apart = stratified_split(labels_N, fraction, seed=3)
    assert sorted([*kept.tolist(), *apart.tolist()]) == list(range(161))
    want = [round(fraction * n) for n in (1, 7, 20, 33, 100)]
    assert labels_N[apart].bincount(minlength=5).tolist() == want


def test_a_split_follows_its_seed() -> None:
    labels_N = torch.arange(200) % 4
    once, again, other = (stratified_split(labels_N, 0.2, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_subset_of_sorted_classes_is_balanced_and_no_prefix() -> None:
    labels_N = torch.arange(10).repeat_interleave(30)
    some = take(images_of(labels_N), 43, seed=0)
    assert sorted(some.labels_N.bincount().tolist()) == [4] * 7 + [5] * 3
    rows = some.pixels_NCHW[:, 0, 0, 0]
    assert torch.equal(labels_N[rows], some.labels_N)
    assert len(rows.unique()) == 43
    assert (rows % 30).max() > 20, "rows from all over a class, not its first ones"


def test_a_subset_takes_all_of_small_classes_before_more_of_large_ones() -> None:
    labels_N = torch.arange(3).repeat_interleave(torch.tensor([2, 50, 50]))
    assert take(images_of(labels_N), 22, seed=0).labels_N.bincount().tolist() == [2, 10, 10]


def test_subsets_of_one_seed_are_nested_and_of_two_seeds_differ() -> None:
    every = images_of(torch.arange(300) % 7)
    small, large, other = (
        set(take(every, count, seed).pixels_NCHW[:, 0, 0, 0].tolist())
        for count, seed in ((20, 5), (90, 5), (20, 6))
    )
    assert small < large
    assert small != other


def test_no_count_is_all_and_too_many_is_refused() -> None:
    every = images_of(torch.arange(30) % 3)
    assert len(take(every, None, seed=0)) == len(take(every, 30, seed=0)) == 30
    with pytest.raises(ValueError, match=r"train_images must be in 1\.\.30, got 31"):
        take(every, 31, seed=0, name="train_images")


def make(labels_N: Tensor, validation: float, train_images: int | None = None):
    return make_splits(
        images_of(labels_N),
        images_of(labels_N),
        0,
        train_images=train_images,
        test_images=6,
        validation=validation,
        sha256="",
        class_names=("a", "b", "c"),
    )


def test_train_and_validation_share_no_image() -> None:
    splits = make(torch.arange(60) % 3, 0.1, train_images=30)
    train, validation = (
        set(part.pixels_NCHW[:, 0, 0, 0].tolist()) for part in (splits.train, splits.validation)
    )
    assert (len(train), len(validation), len(splits.test)) == (27, 3, 6)
    assert not train & validation


def test_classes_too_small_for_a_fraction_still_leave_a_validation_split() -> None:
    splits = make(torch.arange(12) % 3, 0.1)  # 4 of each class: a tenth rounds to none
    assert (len(splits.train), len(splits.validation)) == (11, 1)
    with pytest.raises(ValueError, match="train_images must be at least 2 to keep one apart"):
        make(torch.arange(12) % 3, 0.1, train_images=1)


def test_an_epoch_is_a_permutation_of_seed_and_epoch_alone() -> None:
    order = epoch_order(50, seed=1, epoch=2)
    torch.rand(3)
    assert torch.equal(order, epoch_order(50, seed=1, epoch=2))
    assert torch.equal(order.sort().values, torch.arange(50))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(order, epoch_order(50, seed, epoch))


def slow_augment(x_BCHW: Tensor, pad: int, flip: bool, generator: Generator) -> Tensor:
    """Image by image and pixel by pixel, with the draws in the same order."""
    b, _, h, w = x_BCHW.shape
    coin_B = torch.rand(b, generator=generator) < 0.5 if flip else torch.zeros(b).bool()
    shift_2B = (
        torch.randint(2 * pad + 1, (2, b), generator=generator) if pad else torch.zeros(2, b)
    ).long()
    y_BCHW = torch.zeros_like(x_BCHW)
    for i in range(b):
        for row in range(h):
            for column in range(w):
                source_row = row + int(shift_2B[0, i]) - pad
                source = w - 1 - column if coin_B[i] else column
                source += int(shift_2B[1, i]) - pad
                if 0 <= source_row < h and 0 <= source < w:
                    y_BCHW[i, :, row, column] = x_BCHW[i, :, source_row, source]
    return y_BCHW


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (2, False), (2, True), (9, True)])
def test_augmentation_equals_a_loop_over_pixels(pad: int, flip: bool) -> None:
    x_BCHW = torch.rand(12, 3, 5, 6)
    y_BCHW = augment(x_BCHW, pad=pad, flip=flip, generator=seeded(4))
    assert torch.equal(y_BCHW, slow_augment(x_BCHW, pad, flip, seeded(4)))


@pytest.mark.parametrize("world", [2, 4])
def test_augmentation_does_not_depend_on_the_number_of_workers(world: int) -> None:
    x_BCHW = torch.rand(16, 3, 8, 8)
    whole = augment(x_BCHW, pad=2, flip=True, generator=seeded(0))
    parts = [
        augment(part, pad=2, flip=True, generator=seeded(0), rank=rank, world=world)
        for rank, part in enumerate(x_BCHW.chunk(world))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_augmentation_flips_half_and_reaches_every_shift() -> None:
    x_BCHW = torch.zeros(900, 1, 3, 3)
    x_BCHW[:, :, 1, 1] = 1  # the centre lands on each of nine places
    places = augment(x_BCHW, pad=1, flip=False, generator=seeded(0)).sum(dim=0)
    assert places.min() > 60
    assert places.sum() == 900
    x_BCHW = torch.tensor([1.0, 0.0]).expand(900, 1, 1, 2)
    flipped = augment(x_BCHW, pad=0, flip=True, generator=seeded(0))[:, 0, 0, 1].mean()
    assert 0.4 < flipped < 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pad": -1}, "pad must be at least 0, got -1"), ({"rank": 2, "world": 2}, r"0\.\.1, got 2")],
)
def test_augmentation_refuses_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(
            torch.rand(2, 3, 4, 4), **{"pad": 0, "flip": True, "generator": seeded(0)} | settings
        )


def test_floats_are_pixels_over_255() -> None:
    pixels = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.equal(pixels, torch.tensor([0, 51 / 255, 1]))
    with pytest.raises(ValueError, match=r"pixels must be uint8, got torch\.float32"):
        to_float(torch.rand(2))


def test_importing_the_room_needs_only_torch_and_numpy() -> None:
    code = (
        "import sys, pipeline.data, pipeline.data.splits;"
        "print([m for m in ('pyarrow', 'PIL', 'sklearn', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
