"""Images and where they come from: splits, subsets, the order of an epoch, augmentation.

Shapes: N images of a split, B of a batch on one worker, C channels, H x W pixels, K classes.
Every draw follows from the seed it is given; none depends on the number of workers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from pipeline.data.files import Place


@dataclass(frozen=True, kw_only=True)
class Share:
    """One worker's part of what is left of an epoch.

    Batch s of an epoch is images ``s * batch_size`` to ``(s + 1) * batch_size`` of its order; a
    last batch that would be smaller is left out. Of each batch the worker has the ``rank``-th of
    ``world`` equal parts.

    Attributes:
        seed, epoch: These fix the order.
        first: The batch to begin with.
        batch_size: Images of a batch over all workers.
        rank, world: This worker, and how many there are.
    """

    seed: int
    epoch: int
    first: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def positions(self, images: int) -> list[Tensor]:
        """List for each batch which places in the order of an epoch are this worker's."""
        size = self.batch_size // self.world
        steps = range(self.first, images // self.batch_size)
        lows = [step * self.batch_size + self.rank * size for step in steps]
        return [torch.arange(low, low + size) for low in lows]


class Source(Protocol):
    """Training images, wherever they lie."""

    @property
    def labels_N(self) -> Tensor: ...  # noqa: N802
    def __len__(self) -> int: ...

    def batches(self, share: Share) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels (B, C, H, W), uint8, and labels (B,), as many batches on every worker."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels as uint8 (N, C, H, W) in 0..255, and labels as int64 (N,)."""

    pixels_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def pick(self, rows: Tensor) -> Images:
        """Copy the images at these positions."""
        return Images(self.pixels_NCHW[rows], self.labels_N[rows])

    def batches(self, share: Share) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in an order that is a permutation of all images."""
        order_N = epoch_order(len(self), share.seed, share.epoch)
        for place_B in share.positions(len(self)):
            rows_B = order_N[place_B]
            yield self.pixels_NCHW[rows_B], self.labels_N[rows_B]


@dataclass(frozen=True, eq=False)
class Splits:
    """What a run sees: ``sha256`` is the whole content on disk, before any subset is taken."""

    train: Source
    validation: Images
    test: Images
    sha256: str
    class_names: tuple[str, ...]


def locate(path: str, name: str) -> Place:
    """Name a dataset's folder: ``path``, or else ``name`` in ``$ROBUST_MOE_DATA`` or ``data``.

    Either may be a URI, such as ``s3://bucket/prefix``.
    """
    root = os.environ.get("ROBUST_MOE_DATA") or "data"
    if "://" in (path or root):
        from pipeline.data.files import Remote  # only here: needs pyarrow and Pillow

        return Remote(path) if path else Remote(root) / name
    return Path(path or Path(root) / name).expanduser()


def stream(*words: object) -> Generator:
    """Make a CPU generator that depends on these words alone, whatever was drawn before."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def shuffled_in_class(labels_N: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Group positions by class, in random order within each.

    Returns:
        Positions (N,), and for each of them how many of its class come before it (N,).
    """
    order_N = torch.randperm(len(labels_N), generator=generator)
    order_N = order_N[labels_N[order_N].argsort(stable=True)]
    counts_K = labels_N.bincount()
    first_K = counts_K.cumsum(0) - counts_K
    return order_N, torch.arange(len(labels_N)) - first_K[labels_N[order_N]]


def stratified_split(labels_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Part the positions in two; of n images of a class, round(fraction * n) go to the second.

    Raises:
        ValueError: ``fraction`` is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    order_N, place_N = shuffled_in_class(labels_N, stream("split", seed))
    quota_K = (labels_N.bincount().double() * fraction).round().long()
    apart_N = place_N < quota_K[labels_N[order_N]]
    return order_N[~apart_N].sort().values, order_N[apart_N].sort().values


def take(images: Images, count: int | None, seed: int, *, name: str = "count") -> Images:
    """Draw ``count`` images (None: all) as evenly over the classes as they allow.

    With one seed, a smaller draw is part of every larger one. Order is that of ``images``.

    Raises:
        ValueError: More images are wanted than there are; ``name`` says which setting it was.
    """
    if count is None or count == len(images):
        return images
    return images.pick(choose(images.labels_N, count, seed, name=name))


def choose(labels_N: Tensor, count: int | None, seed: int, *, name: str) -> Tensor:
    """Choose ``count`` positions (None: all) as evenly over the classes as they allow, sorted.

    Raises:
        ValueError: More are wanted than there are; ``name`` says which setting it was.
    """
    if count is None or count == len(labels_N):
        return torch.arange(len(labels_N))
    if not 1 <= count <= len(labels_N):
        raise ValueError(f"{name} must be in 1..{len(labels_N)}, got {count}")
    return even_subset(labels_N, count, seed)


def even_subset(labels_N: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` positions by rounds, one of each class that has any left in a round."""
    generator = stream("take", seed)
    order_N, place_N = shuffled_in_class(labels_N, generator)
    num_classes = int(labels_N.max()) + 1
    turn_K = torch.randperm(num_classes, generator=generator)  # who is first in every round
    rounds_N = place_N * num_classes + turn_K[labels_N[order_N]]
    return order_N[rounds_N.argsort()[:count]].sort().values


def make_splits(
    train: Images,
    test: Images,
    seed: int,
    *,
    train_images: int | None,
    test_images: int | None,
    validation: float,
    sha256: str,
    class_names: tuple[str, ...],
) -> Splits:
    """Take the wanted subsets, then keep a part of the train images for validation.

    Those of the training images follow from the seed, those of the test images from the data alone.

    Raises:
        ValueError: More images are wanted than there are, or too few remain to part.
    """
    train = take(train, train_images, seed, name="train_images")
    test = take(test, test_images, 0, name="test_images")  # the same for every seed
    kept, apart = hold_out(train.labels_N, validation, seed)
    return Splits(train.pick(kept), train.pick(apart), test, sha256, class_names)


def hold_out(labels_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Part the training images in those to train on and those to validate on.

    Where classes are so small that none would give a single image, a balanced draw of the same
    fraction, at least one image, takes their place.

    Raises:
        ValueError: There are too few to part.
    """
    if len(labels_N) < 2:
        raise ValueError(f"train_images must be at least 2 to keep one apart, got {len(labels_N)}")
    kept, apart = stratified_split(labels_N, fraction, seed)
    if len(apart):
        return kept, apart
    apart = even_subset(labels_N, max(1, round(fraction * len(labels_N))), seed)
    mask_N = torch.ones(len(labels_N), dtype=torch.bool)
    mask_N[apart] = False
    return mask_N.nonzero().squeeze(1), apart


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Permute 0..n-1 for one epoch; the same on every worker and after every restart."""
    return torch.randperm(n, generator=stream("order", seed, epoch))
