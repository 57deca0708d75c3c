"""Ownership lease of a run folder in an object store, where there are no locks.

The owner's token stands in ``owner.json`` and its count rises every few seconds; a start that sees
it rise leaves the run alone. Who finds none, or one that rests, writes its own, waits, and looks
whose stands: stores show the last write to everybody. No clocks are compared.

Not protected: stores that pyarrow reaches have no conditional writes, so an owner that was frozen
for longer than ``REST`` (a suspended machine) may, between its look at the token and its write,
put one list over its successor's. Both states are whole; one is lost.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.data.files import Remote
from pipeline.storage.object_store import Bucket, StoreError
from pipeline.storage.sync import Part, owner_of

BEAT = 8.0  # seconds between two signs of life, and two pushes of the journal
REST = 40.0  # seconds without a sign after which an owner counts as dead
SETTLE = 1.5  # seconds after which a write of another start would be seen
POLL = 0.5

Say = Callable[[str], None]


@contextmanager
def leased(home: Remote, folder: Path, say: Say, patience: float) -> Iterator[bool]:
    """Own a home for the block, and keep what the driver writes there; tell whether it was free.

    At the start the folder is made what the home holds, at the end the home what the folder holds.

    Raises:
        StoreError: The store cannot be reached.
    """
    token = acquire(home, say, patience)
    if token is None:
        yield False
        return
    part, over = Part(home, folder, "tracking", owner=token), threading.Event()
    try:
        part.pull(keep_newer=True)
        keeper = threading.Thread(target=keep, args=(home, part, token, over, say), daemon=True)
        keeper.start()
        try:
            yield True
        finally:
            over.set()
            keeper.join()
            try:
                part.push()
            except StoreError as error:
                say(f"warning: {error}; it waits in {folder}, and the same command here sends it")
    finally:
        release(home, token)


def acquire(home: Remote, say: Say, patience: float) -> str | None:
    """Become the owner; return the token, or None if another one lives."""
    token, seen, since = uuid.uuid4().hex, dict[str, Any](), time.monotonic()
    deadline, said = since + patience, False
    while True:
        found = dict(owner_of(home))
        if found != seen:
            seen, since = found, time.monotonic()
        if not found or is_dead(found) or time.monotonic() - since > REST:
            sign(home, token, 0)
            time.sleep(SETTLE)
            if owner_of(home).get("token") == token:
                return token
            continue
        if not said:
            say(f"{found.get('host', 'another process')} has {home}, or had it: waits for it")
            said = True
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL)


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Tell whether an owner was a process of this machine that is no more."""
    if owner.get("host") != platform.node() or owner.get("boot") != boot():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def boot() -> str:
    """Tell this start of this machine from others, containers that share a host name included."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + namespace
    except OSError:
        return ""


def sign(home: Remote, token: str, beat: int) -> None:
    """Write that the owner lives."""
    owner = {"token": token, "host": platform.node(), "boot": boot(), "pid": os.getpid()}
    Bucket(home).write("owner.json", json.dumps(owner | {"beat": beat}).encode())


def keep(home: Remote, part: Part, token: str, over: threading.Event, say: Say) -> None:
    """Give signs of life and push the driver's files until told to stop, or another one owns."""
    beat, said = 0, False
    while not over.wait(BEAT):
        try:
            if owner_of(home).get("token") != token:
                say(f"warning: another process has taken over {home}")
                return
            sign(home, token, beat := beat + 1)
            part.push()
            said = False
        except (StoreError, OSError) as error:  # it may come back; a file may just have gone
            if not said:
                say(f"warning: {error}")
            said = True


def release(home: Remote, token: str) -> None:
    """Give a home up, if it is still ours."""
    try:
        if owner_of(home).get("token") == token:
            Bucket(home).delete("owner.json")
    except StoreError:
        pass  # it counts as dead after a while
