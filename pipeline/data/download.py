"""Download datasets where their owners offer them, check the archives, and write parquet."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.image_folder import scan, verified
from pipeline.data.write_parquet import to_png, write_parquet

SUPERCLASSES = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things
    large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
    non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""
SUPERCLASS_OF = """
     4  1 14  8  0  6  7  7 18  3  3 14  9 18  7 11  3  9  7 11
     6 11  5 10  7  6 13 15  3 15  0 11  1 10 12 14 16  9 11  5
     5 19  8  8 15 13 14 17 18 10 16  4 17  4  2  0 17  4 18 17
    10  3  2 12 12 16 12  1  9 19  2 10  0  1 16 12  9 13 15 13
    16 19  2  4  6 19  5  5  8 19 18  1  2 15  6  0 17  8 14 13
"""  # of each of the 100 fine classes of CIFAR-100, which torchvision does not hand out
TINY = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}  # the ten classes by WordNet id, as ImageNet numbers them
FETCHED = ("cifar10", "cifar100", "tiny_imagenet", "imagenette")
BY_HAND = {
    "imagenet": "imagenet cannot be fetched without an account, since its terms have to be "
    "accepted: accept them at huggingface.co/datasets/ILSVRC/imagenet-1k, download its files "
    "train-*.parquet and validation-*.parquet and put them in {folder}; or, from image-net.org's "
    "archives unpacked as FOLDER/train/<wnid>/*.JPEG and FOLDER/val/<wnid>/*.JPEG, run "
    "python -m pipeline.data_tool import FOLDER imagenet"
}


def fetch(name: str, folder: Path) -> list[Path]:
    """Download one of ``FETCHED`` and write its splits as Hugging Face has them.

    Raises:
        OSError, RuntimeError: The download failed, or is not what it should be.
    """
    with tempfile.TemporaryDirectory() as download:
        if name == "tiny_imagenet":
            return fetch_tiny(Path(download), folder)
        if name == "imagenette":
            return fetch_imagenette(Path(download), folder)
        return fetch_cifar(name, download, folder)


def fetch_cifar(name: str, download: str, folder: Path) -> list[Path]:
    """Fetch CIFAR-10 or CIFAR-100 by torchvision."""
    from torchvision import datasets

    make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    written = []
    for split in ("train", "test"):
        source = make(root=download, train=split == "train", download=True)
        labels: dict[str, Sequence[int]] = {"label": source.targets}
        names: dict[str, Sequence[str]] = {"label": source.classes}
        if name == "cifar100":
            superclasses = [int(label) for label in SUPERCLASS_OF.split()]
            coarse = [superclasses[fine] for fine in source.targets]
            labels = {"fine_label": source.targets, "coarse_label": coarse}
            names = {"fine_label": source.classes, "coarse_label": SUPERCLASSES.split()}
        images = ((to_png(pixels), None) for pixels in source.data)
        written.append(write_parquet(folder, split, images, labels, names, image_column="img"))
    return written


def fetch_tiny(download: Path, folder: Path) -> list[Path]:
    """Fetch Tiny-ImageNet from the course that made it; labels are the sorted WordNet ids.

    Its test images have no labels, and are left out.
    """
    from torchvision.datasets import utils

    utils.download_and_extract_archive(TINY[0], str(download), md5=TINY[1])
    root = download / "tiny-imagenet-200"
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    number_of = {name: number for number, name in enumerate(classes)}
    train = [(f, name) for name in classes for f in sorted((root / "train" / name).rglob("*.JPEG"))]
    notes = [
        line.split("\t") for line in (root / "val/val_annotations.txt").read_text().split("\n")
    ]
    valid = [(root / "val/images" / note[0], note[1]) for note in notes if len(note) > 1]
    return [
        write_parquet(
            folder,
            split,
            with_names([file for file, _ in rows]),
            {"label": [number_of[name] for _, name in rows]},
            {"label": classes},
        )
        for split, rows in (("train", train), ("valid", valid))
    ]


def fetch_imagenette(download: Path, folder: Path) -> list[Path]:
    """Fetch Imagenette (shorter side 320) by torchvision; labels are ImageNet's thousand."""
    from torchvision import datasets
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    datasets.Imagenette(root=str(download), size="320px", download=True)  # both splits
    found = scan(next(path for path in download.iterdir() if path.is_dir()))
    return [
        write_parquet(
            folder,
            name,
            with_names(found.splits[split]),
            {"label": [IMAGENETTE[file.parent.name] for file in found.splits[split]]},
            {"label": names},
        )
        for split, name in (("train", "train"), ("val", "validation"))
    ]


def with_names(files: Sequence[Path]) -> Iterator[tuple[bytes, str | None]]:
    """Read image files, each with its name."""
    yield from zip(verified(files), (file.name for file in files), strict=True)
