"""Random numbers that follow from the seed and from where in the run they are drawn."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """Hash a place such as ``(seed, "attack", epoch, step)`` to a 63-bit seed."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_at(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Make a generator for one place of the run: nothing to save, nothing to restore."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class Noise:
    """Random numbers for this worker's part of a batch.

    Drawn for the batch of all workers and cut to the own rows, so that the numbers an image gets
    do not depend on how many workers share the batch. All workers hold a generator in the same
    state and parts of the same size.

    Attributes:
        generator: On the device of the images.
        rank, world: This worker's part of the batch, and the number of parts.
    """

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def uniform(self, x_BCHW: Tensor) -> Tensor:
        """Numbers in [-1, 1), shaped like the images."""
        return self._own(torch.rand, x_BCHW) * 2 - 1

    def normal(self, x_BCHW: Tensor) -> Tensor:
        """Standard normal numbers, shaped like the images."""
        return self._own(torch.randn, x_BCHW)

    def _own(self, draw: object, x_BCHW: Tensor) -> Tensor:
        shape = (self.world * len(x_BCHW), *x_BCHW.shape[1:])
        assert callable(draw)
        whole: Tensor = draw(shape, generator=self.generator, device=x_BCHW.device)
        return whole[self.rank * len(x_BCHW) :][: len(x_BCHW)]


@dataclass(frozen=True)
class ImageNoise:
    """Random numbers for evaluation: each image's follow from its index in the data set alone.

    An image gets the same starts in any batch, order and shard; each draw is a new one, so that
    restarts differ. Every measure begins with a source of its own.
    """

    seed: int
    index_B: Tensor
    turns: Iterator[int] = field(default_factory=itertools.count)

    def uniform(self, x_BCHW: Tensor) -> Tensor:
        """Numbers in [-1, 1), shaped like the images."""
        return self._each(torch.rand, x_BCHW) * 2 - 1

    def normal(self, x_BCHW: Tensor) -> Tensor:
        """Standard normal numbers, shaped like the images."""
        return self._each(torch.randn, x_BCHW)

    def _each(self, draw: object, x_BCHW: Tensor) -> Tensor:
        assert callable(draw)
        turn, shape = next(self.turns), x_BCHW.shape[1:]
        rows = [
            draw(shape, generator=generator_at("cpu", self.seed, "image", index, turn))
            for index in self.index_B.tolist()
        ]
        return torch.stack(rows).to(x_BCHW.device) if rows else x_BCHW.clone()
