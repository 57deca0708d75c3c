"""Download CIFAR-10 and CIFAR-100 with torchvision, which checks the archives' md5 sums."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.writing import to_png, write_parquet

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
FETCHED = ("cifar10", "cifar100")


def fetch(name: str, folder: Path) -> list[Path]:
    """Download one of ``FETCHED`` and write both splits as Hugging Face has them.

    Raises:
        OSError, RuntimeError: The download failed, or is not what it should be.
    """
    from torchvision import datasets

    make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    written = []
    with tempfile.TemporaryDirectory() as download:
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
