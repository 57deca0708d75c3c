"""State files of a run, a sweep or a grid, read back: whole, or named and set aside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, TypeVar

T = TypeVar("T")

RESULT: Mapping[str, type | tuple[type, ...]] = {
    "metrics": dict,
    "run_id": (str, NoneType),
    "ui": str,
}
"""What a finished run leaves in ``result.json``."""
RUN: Mapping[str, type | tuple[type, ...]] = {"key": str, "start_ms": int}
"""What a run that is tracked has in ``run.json``, at the least."""
NOTHING: Mapping[str, type] = MappingProxyType({})


def read_state(
    path: Path,
    fields: Mapping[str, type | tuple[type, ...]] = NOTHING,
    say: Callable[[str], None] | None = None,
    read: Callable[[Any], T] = dict,  # type: ignore[assignment]
) -> T | None:
    """Read a JSON file that an earlier process wrote; None: there is none that can be used.

    A file may be empty or cut off (a full disk, a machine that went down) or another program's. It
    is renamed to ``<name>.damaged``, so that nothing is lost, and what it held is found again or
    made again by the caller.

    Args:
        fields: What the object must have, and of which type.
        say: Takes the line that says so.
        read: Makes of the object what is returned; whatever it raises, the file is damaged.
    """
    try:
        return read(_checked(path.read_text(encoding="utf-8", errors="replace"), fields))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        why = "it is a folder"
    except UnusableError as error:
        why = str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it is none of ours ({type(error).__name__}: {error})"
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    if say is not None:
        say(f"warning: {path} cannot be used, {why}; it is kept as {aside.name}")
    return None


class UnusableError(ValueError):
    """A state file holds something else."""


def _checked(text: str, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        why = "it is cut off or no JSON" if text.strip() else "it is empty"
        raise UnusableError(why) from None
    if not isinstance(found, dict):
        raise UnusableError(f"it holds a {type(found).__name__}")
    for name, kind in fields.items():
        if not isinstance(found.get(name, NOTHING), kind):
            has = f"its {name} is {found[name]!r}" if name in found else f"it has no {name}"
            raise UnusableError(has)
    return found
