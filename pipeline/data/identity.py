"""Which data a run was trained on: the sha256 of the files, compared on every way back."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from pipeline.data.base import Dataset


class OtherDataError(ValueError):
    """A run, cell or sweep would go on with other data than it began with."""


def check_same_data(what: str, then: str | None, now: str) -> None:
    """Refuse to mix numbers of two data sets under one name.

    Args:
        what: Run, trial or cell, for the message.
        then: sha256 of the data that it saw before; None or empty: not kept at that time.
        now: sha256 of the data that are there now.

    Raises:
        OtherDataError: They differ.
    """
    if then and then != now:
        raise OtherDataError(
            f"{what} saw other data (sha256 {then[:12]} then, {now[:12]} now): give these a "
            "name= or experiment= of their own, point ROBUST_MOE_DATA or dataset.path to the data "
            "of then, or start over with --fresh"
        )


def check_data_of(what: str, then: str | None, dataset: Dataset, say: Callable[[str], None]) -> str:
    """Compare the data of a record with those that are there now, and return the sha256 of these.

    Where a comparison is not possible, a line says so: the record may be older than its hash, and
    finished numbers are worth showing where their data are not.

    Args:
        what, then: As of ``check_same_data``.
        say: Takes the line.

    Raises:
        OtherDataError: They differ.
    """
    if not then:
        say(f"warning: {what} does not say what data it saw: it is taken for the data of now")
    try:
        now = data_sha256(dataset)
    except ValueError as error:
        if not then:
            raise
        say(f"warning: whether {what} saw these data cannot be seen: {error}")
        return then
    check_same_data(what, then, now)
    return now


def data_sha256(dataset: Dataset) -> str:
    """Hash of a data set's files, the same for every seed.

    Raises:
        ValueError: The data are not there, or damaged.
    """
    settings: Any = dataset  # frozen dataclasses, which hash
    return _sha256(settings, os.environ.get("ROBUST_MOE_DATA", ""))


@cache
def _sha256(dataset: Any, root: str) -> str:
    return str(dataset.load(0).sha256)
