"""Comparison of class names: what makes a label mean the same in two places."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence


class ClassNamesError(ValueError):
    """Two places give the same labels to different classes."""


def check_same_classes(
    where: str, names: Sequence[str], other_where: str, other: Sequence[str]
) -> None:
    """Refuse two lists of class names that are not equal; unknown ones pass.

    Every place that brings two sets of labels together asks here: shards, splits, a checkpoint and
    the data it is evaluated on, the halves of a dual model, the source of a transfer.

    Args:
        where, other_where: File or model that each list is from, for the message.

    Raises:
        ClassNamesError: The lists differ; names the first class that does and the likely cause. Or
            two classes have one name.
    """
    for place, own in ((where, names), (other_where, other)):
        if twice := [name for name, count in Counter(own).items() if count > 1]:
            raise ClassNamesError(f"{place}: two classes are called {twice[0]!r}")
    if unknown(names) or unknown(other) or tuple(names) == tuple(other):
        return
    if len(names) != len(other):
        raise ClassNamesError(
            f"{where} has {len(names)} classes, {other_where} has {len(other)}"
            f"{likely_cause(names, other)}"
        )
    first = next(n for n, (a, b) in enumerate(zip(names, other, strict=True)) if a != b)
    raise ClassNamesError(
        f"label {first} is {names[first]!r} in {where} and {other[first]!r} in {other_where}: the "
        f"same label would be two classes{likely_cause(names, other)}"
    )


def unknown(names: Sequence[str]) -> bool:
    """Whether a list says nothing: it is empty, or the labels' own numbers in their place."""
    return all(name == str(label) for label, name in enumerate(names))


def likely_cause(names: Sequence[str], other: Sequence[str]) -> str:
    """Say why two lists of names may differ, as the end of a message; empty if nothing fits."""
    if set(names) == set(other):
        if all(name.isdigit() for name in names):
            return "; one of them orders numbers as words (10 before 2)"
        return "; the names are the same in another order"
    for cause, form in (
        ("they differ in upper and lower case", str.casefold),
        ("they differ in their Unicode form (NFC, NFD)", normal),
        ("they differ in blanks, dashes or underscores", squeezed),
    ):
        if set(map(form, names)) == set(map(form, other)):
            return f"; {cause}"
    if not set(names) & set(other):
        return "; they have no name in common: is one of them another data set?"
    return ""


def normal(name: str) -> str:
    """One Unicode form of a name."""
    return unicodedata.normalize("NFC", name)


def squeezed(name: str) -> str:
    """A name without what writers of folders put in place of a blank."""
    return "".join(letter for letter in name.casefold() if letter not in " _-")
