"""Outcomes on disk: what an evaluation found is there for the next one, and after a crash.

One parquet data set for each pair of weights and attack, a folder of parts; each part is one batch
and appears whole or not at all, so that a process killed at any moment loses at most a batch.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.splits import Images
from pipeline.measures import Measure
from pipeline.measures.outcomes import TYPES

OUTCOMES_VERSION = "3"
"""Raised by hand with every change that changes an outcome; outcomes of other versions are not
read."""


@dataclass(frozen=True)
class OutcomeCache:
    """Outcomes by weights, attack and image; see ``pipeline.measures.outcomes.Store``.

    Attributes:
        folder: Holds one folder for each weights, named by their hash, and in it one data set for
            each attack.
        weights: Hash of the weights and of the settings that make them a network.
        context: Hash of what else decides an outcome beside the attack's own settings: seed,
            images, ``OUTCOMES_VERSION``.
    """

    folder: Path
    weights: str
    context: str

    def read(self, measure: Measure) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images whose outcome is known, and its columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        home = self.home(measure)
        parts = [pq.read_table(part) for part in sorted(home.glob("*.parquet"))]
        if not parts:
            return torch.empty(0, dtype=torch.int64), {}
        table = pa.concat_tables(parts)
        ids_M = torch.from_numpy(table["image"].to_numpy().copy())
        columns = {}
        for key in TYPES:
            found = np.stack(table[key].to_numpy(zero_copy_only=False))
            columns[key] = torch.from_numpy(found.copy())
        return ids_M, columns

    def write(self, measure: Measure, ids_B: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Keep the outcome of some images: written aside, then renamed."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        home = self.home(measure)
        home.mkdir(parents=True, exist_ok=True)
        rows: dict[str, Any] = {"image": ids_B.numpy()}
        rows |= {key: list(column.numpy()) for key, column in columns.items()}
        table = pa.table(rows).replace_schema_metadata({"attack": repr(measure)})
        draft = home / f".{uuid.uuid4().hex}"
        pq.write_table(table, draft)
        draft.replace(home / f"{draft.name[1:]}.parquet")

    def home(self, measure: Measure) -> Path:
        """Name the data set of an attack, by all that decides its outcomes and not by its name."""
        own = digest(*identity(measure), self.context)
        return self.folder / self.weights[:16] / f"{type(measure).__name__}-{own[:16]}"


def identity(measure: Measure) -> list[str]:
    """Say what an attack is: its kind, its settings, and the weights of a network among them."""
    kind = type(measure)
    words = [kind.__qualname__, repr(measure)]
    for value in vars(measure).values():
        if isinstance(value, nn.Module):
            state = {name: tensor.cpu() for name, tensor in value.state_dict().items()}
            words += [
                f"{n} {hashlib.sha256(t.numpy().tobytes()).hexdigest()}" for n, t in state.items()
            ]
    return words


def digest(*parts: str) -> str:
    """Hash some words, 64 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest_of_images(images: Images) -> str:
    """Hash pixels and labels, in their order: image 7 of two sets is one image if this is equal."""
    pixels, labels = images.pixels_NCHW.contiguous(), images.labels_N.contiguous()
    found = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    found.update(pixels.numpy().data)
    found.update(labels.numpy().data)
    return found.hexdigest()
