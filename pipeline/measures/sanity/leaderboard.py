"""The best public robust accuracies, to hold ours against.

RobustBench's leaderboard (arXiv:2010.09670), AutoAttack, L-inf 8/255, in percent. The 55.85 of
WRN-28-10 is MAIR's, TRADES with AWP.
"""

from __future__ import annotations

from typing import NamedTuple

EPS = 8 / 255


class Reference(NamedTuple):
    """One row: the robust accuracy in percent of a data set and an architecture."""

    dataset: str
    backbone: str
    synthetic_data: bool
    robust: float


REFERENCES = (
    Reference("cifar10", "resnet18", False, 52.48),
    Reference("cifar10", "resnet18", True, 58.50),
    Reference("cifar10", "wrn28_10", False, 55.85),
    Reference("cifar10", "wrn28_10", True, 67.73),
    Reference("cifar100", "resnet18", False, 27.67),
    Reference("cifar100", "wrn28_10", False, 39.18),
)


def reference(
    dataset: str, backbone: str, *, norm: str, eps: float, synthetic_data: bool = False
) -> Reference | None:
    """Find the row to hold a result against; None where no public number says anything.

    A backbone without a row is held against the best of its data set: no small net is known to
    beat a large one. A radius below 8/255 is an easier threat, another norm another one.
    """
    if norm != "linf" or eps < EPS - 1e-9:
        return None
    rows = [
        row for row in REFERENCES if row.dataset == dataset and row.synthetic_data <= synthetic_data
    ]
    own = [row for row in rows if row.backbone == backbone]
    return max(own or rows, key=lambda row: row.robust, default=None)
