"""Old names of losses, as runs and checkpoints made before a renaming still have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
RENAMED = {
    "router_homed": "router_pseudo_label",
    "router_steady": "router_consistency",
    "steady": "consistency",
}
METRIC = "train/loss_"


def with_current_names(values: Mapping[str, T]) -> dict[str, T]:
    """Rename losses, or the metrics ``train/loss_*`` of losses, to what they are called today."""
    found = {}
    for name, value in values.items():
        prefix = METRIC if name.startswith(METRIC) else ""
        loss = name.removeprefix(METRIC)
        found[prefix + RENAMED.get(loss, loss)] = value
    return found
