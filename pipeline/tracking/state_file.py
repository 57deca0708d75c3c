"""State files of a run, a sweep or a grid, read back: whole, or named and set aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_state(
    path: Path, keys: tuple[str, ...] = (), say: Callable[[str], None] | None = None
) -> dict[str, Any] | None:
    """Read a JSON object that an earlier process wrote; None: there is none that can be used.

    A file may be empty or cut off (a full disk, a machine that went down) or another program's. It
    is renamed to ``<name>.damaged``, so that nothing is lost, and what it held is found again or
    made again by the caller.

    Args:
        keys: What the object must have.
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
        if isinstance(found, dict) and not (missing := [key for key in keys if key not in found]):
            return found
        why = f"it has no {missing[0]}" if isinstance(found, dict) else "it is no JSON object"
    except ValueError:
        why = "it is cut off or no JSON" if text.strip() else "it is empty"
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    if say is not None:
        say(f"warning: {path} cannot be used, {why}; it is kept as {aside.name}")
    return None
