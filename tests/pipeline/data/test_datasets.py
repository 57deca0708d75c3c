"""Every dataset of the registry, and the real CIFAR files where they are."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.data import DATASETS, OnDisk
from pipeline.data.cifar import Cifar10, Cifar100
from pipeline.data.digits import Digits
from pipeline.data.splits import Splits
from pipeline.data.synthetic import Synthetic
from pipeline.data.tiny_imagenet import TinyImageNet

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("ROBUST_MOE_DATA") or ROOT / "data")


def counts(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.validation), len(splits.test)


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_is_frozen_and_has_the_shared_fields(name: str) -> None:
    settings = DATASETS[name]()
    fields = {field.name for field in dataclasses.fields(settings)}
    assert {"path", "train_images", "test_images", "validation", "pad", "flip"} <= fields
    assert settings.num_classes >= 2
    assert settings.image_size >= 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.validation = 0.2


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"validation": 0.0}, r"validation must be above 0 and at most 0\.5, got 0\.0"),
        ({"validation": 0.6}, r"validation must be above 0 and at most 0\.5, got 0\.6"),
        ({"train_images": 0}, "train_images must be at least 1, got 0"),
        ({"test_images": -2}, "test_images must be at least 1, got -2"),
        ({"pad": -1}, "pad must be at least 0, got -1"),
    ],
)
def test_every_dataset_refuses_settings_out_of_range(name: str, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DATASETS[name](**wrong)


def test_digits_has_its_known_counts() -> None:
    splits = Digits().load(seed=0)
    assert sum(counts(splits)) == 1797
    assert counts(splits) == (1295, 143, 359)
    assert splits.train.pixels_NCHW.shape[1:] == (3, 8, 8)
    assert splits.train.pixels_NCHW.max() == 255
    assert torch.equal(splits.test.pixels_NCHW[:, 0], splits.test.pixels_NCHW[:, 2])
    assert len(splits.class_names) == 10


@pytest.mark.parametrize("settings", [Digits(), Synthetic(size=8)])
def test_the_seed_moves_validation_but_not_test(settings: Digits | Synthetic) -> None:
    one, same, other = (settings.load(seed) for seed in (0, 0, 1))
    assert torch.equal(one.validation.pixels_NCHW, same.validation.pixels_NCHW)
    assert not torch.equal(one.validation.pixels_NCHW, other.validation.pixels_NCHW)
    assert torch.equal(one.test.pixels_NCHW, other.test.pixels_NCHW)
    assert one.sha256 == other.sha256


def test_digits_subsets_are_balanced() -> None:
    splits = Digits(train_images=100, test_images=20, validation=0.2).load(seed=3)
    assert counts(splits) == (80, 20, 20)
    assert splits.test.labels_N.bincount().tolist() == [2] * 10
    with pytest.raises(ValueError, match=r"test_images must be in 1\.\.359, got 360"):
        Digits(test_images=360).load(seed=0)


def test_synthetic_makes_what_is_asked_and_a_template_classifies_it() -> None:
    settings = Synthetic(classes=4, size=8, train_images=80, test_images=40)
    splits = settings.load(seed=0)
    assert counts(splits) == (72, 8, 40)
    assert (settings.num_classes, settings.image_size) == (4, 8)
    assert counts(Synthetic(size=8).load(seed=0)) == (462, 50, 128)
    x_ND = splits.train.pixels_NCHW.flatten(1).float()
    mean_KD = torch.stack([x_ND[splits.train.labels_N == k].mean(0) for k in range(4)])
    near_N = torch.cdist(splits.test.pixels_NCHW.flatten(1).float(), mean_KD).argmin(1)
    assert torch.equal(near_N, splits.test.labels_N)
    for wrong in ({"classes": 1}, {"size": 3}):
        with pytest.raises(ValueError, match=r"must be at least \d, got"):
            Synthetic(**wrong)


def test_cifar_is_found_by_path_and_by_environment(
    tmp_path: Path, encode: Callable, write: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = [encode(seed=seed) for seed in range(20)], [i % 10 for i in range(20)]
    for split in ("train", "test"):
        write(tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet", images, labels)
    found = Cifar10(path=str(tmp_path / "cifar10"), validation=0.5, test_images=10).load(seed=0)
    assert counts(found) == (10, 10, 10)
    assert found.class_names == tuple("0123456789")
    monkeypatch.setenv("ROBUST_MOE_DATA", str(tmp_path))
    assert Cifar10().load(seed=0).sha256 == found.sha256
    with pytest.raises(ValueError, match=r"cifar100 does not exist; set ROBUST_MOE_DATA"):
        Cifar100().load(seed=0)


def test_only_files_make_a_dataset_on_disk() -> None:
    on_disk = {name for name, kind in DATASETS.items() if isinstance(kind(), OnDisk)}
    assert on_disk == {"cifar10", "cifar100", "tiny_imagenet", "imagenet"}


@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="no real CIFAR-100 at hand")
def test_the_real_cifar100_loads_the_same_from_files_and_from_the_cache() -> None:
    settings = Cifar100(path=str(REAL / "cifar100"), train_images=1000)
    first, again = settings.load(seed=0), settings.load(seed=0)
    assert first.validation.labels_N.bincount().tolist() == [1] * 100
    assert first.train.labels_N.bincount().tolist() == [9] * 100
    assert first.class_names[:2] == ("apple", "aquarium_fish")
    for one, other in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(one.pixels_NCHW, other.pixels_NCHW)
        assert torch.equal(one.labels_N, other.labels_N)
    assert 100 < first.test.pixels_NCHW.float().mean() < 140


@pytest.mark.skipif(not (REAL / "tiny-imagenet").is_dir(), reason="no real Tiny-ImageNet at hand")
def test_the_real_tiny_imagenet_has_all_its_classes() -> None:
    splits = TinyImageNet(path=str(REAL / "tiny-imagenet")).load(seed=0)
    assert len(splits.test.labels_N.unique()) == len(splits.class_names) == 200
    assert splits.train.pixels_NCHW.shape[1:] == (3, 64, 64)
    assert 100 < splits.test.pixels_NCHW.float().mean() < 140
