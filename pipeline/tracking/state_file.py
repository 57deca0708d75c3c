"""State files of a run, a sweep or a grid, read back: whole, or named and set aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_state(
    path: Path,
    keys: tuple[str, ...] = (),
    say: Callable[[str], None] | None = None,
    kind: type | tuple[type, ...] = dict,
) -> Any:
    """Read a JSON file that an earlier process wrote; None: there is none that can be used.

    A file may be empty or cut off (a full disk, a machine that went down) or another program's. It
    is renamed to ``<name>.damaged``, so that nothing is lost, and what it held is found again or
    made again by the caller.

    Args:
        keys: What the object must have.
        kind: What it must be.
        say: Takes the line that says so.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        text = ""
    try:
        found = json.loads(text)
        right = isinstance(found, kind)
        missing = [key for key in keys if right and key not in found]
        if right and not missing:
            return found
        why = f"it has no {missing[0]}" if missing else f"it holds a {type(found).__name__}"
    except ValueError:
        why = "it is cut off or no JSON" if text.strip() else "it is empty"
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    if say is not None:
        say(f"warning: {path} cannot be used, {why}; it is kept as {aside.name}")
    return None
