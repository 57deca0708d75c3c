"""MLflow's database as a file: its path as a URI and back, and paths in it that survive a move.

A path is not a URI. These two functions are the only place that makes one of the other.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit

SQLITE = "sqlite:///"
ESCAPES = {"%": "%25", "?": "%3F"}
"""What a path may hold and a database URI reads otherwise: SQLAlchemy from 2.1 on unquotes it."""


def to_uri(path: Path) -> str:
    """Make the URI of a database file."""
    text = str(path)
    if tuple(map(int, version("sqlalchemy").split(".")[:2])) >= (2, 1):
        for sign, escape in ESCAPES.items():
            text = text.replace(sign, escape)
    return f"{SQLITE}{text}"


def to_path(uri: str) -> Path | None:
    """Return the file of a database URI; None for a server."""
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def artifact_folder(uri: str) -> Path | None:
    """Return where artifacts of a database file lie, next to it; None for a server."""
    file = to_path(uri)
    return file.parent / "mlartifacts" if file is not None else None


def follow_move(uri: str) -> None:
    """Point a database file's records to the artifacts next to it, if both were moved together.

    MLflow keeps absolute addresses of artifacts (mlflow/mlflow issue 3144): after the working
    directory is renamed or copied, models are not found, and new ones go to the old place. An
    address is changed only where its folder is gone and the one next to the database is there.
    """
    file, folder = to_path(uri), artifact_folder(uri)
    if file is None or folder is None or not (file.is_file() and folder.is_dir()):
        return
    with closing(sqlite3.connect(file, timeout=10)) as base:
        try:
            rows = base.execute("SELECT experiment_id, artifact_location FROM experiments")
            moved = [(key, old, new) for key, old in rows if (new := new_place(old, folder))]
            for key, old, new in moved:
                base.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                    (new, key),
                )
                base.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?)"
                    " WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                    (new, len(old) + 1, key, len(old), old),
                )
            base.commit()
        except sqlite3.Error:  # no tables yet, or not ours: MLflow says so better
            base.rollback()


def drop_misread_folder(uri: str) -> None:
    """Remove the empty folder that MLflow makes where it takes a URI's escapes for a path."""
    file, misread = to_path(uri), Path(uri.removeprefix(SQLITE)).parent
    if file is not None and misread != file.parent:
        with suppress(OSError):  # it is not there, or not empty: not MLflow's
            misread.rmdir()


def new_place(location: str | None, folder: Path) -> str:
    """Return the address of an experiment's artifacts below ``folder``; empty: as it is."""
    parts = urlsplit(location or "")
    old = Path(unquote(parts.path))
    if parts.scheme != "file" or old.parent.name != folder.name or old.exists():
        return ""
    new = folder / old.name
    return new.as_uri() if new.is_dir() else ""
