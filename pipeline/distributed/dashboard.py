"""Whether a server answers, and what it says: Ray's dashboard and MLflow, over HTTP alone."""

from __future__ import annotations

import ipaddress
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DASHBOARD = "http://127.0.0.1:8265"


@dataclass(frozen=True)
class Reply:
    """What a server said: its status (0: nothing came) and the text, or the reason why not."""

    status: int
    text: str


class Unfollowed(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for the answer: a token goes to the server that was named, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


def ask(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    wait: float = 5,
) -> Reply:
    """Send one request; GET without a body, POST with one."""
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}))
    try:
        with urllib.request.build_opener(Unfollowed).open(request, timeout=wait) as answer:
            return Reply(answer.status, answer.read(65536).decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read(65536).decode(errors="replace"))
    except (OSError, ValueError) as error:
        return Reply(0, str(getattr(error, "reason", error)))


def is_loopback(url: str) -> bool:
    """Tell whether a URL's host is this machine and nobody else's."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ray_token() -> str:
    """Find Ray's token where Ray itself looks for it; empty: there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Dashboard:
    """What a dashboard lets in.

    Attributes:
        state: ``open`` (anybody may run code there), ``ready`` (wants a token, takes ours),
            ``no token``, ``wrong token``, ``away``, or ``other`` (it is not Ray's).
        detail: Ray's version where it lets us in, else what came instead.
    """

    state: str
    detail: str


def look_at_dashboard(url: str) -> Dashboard:
    """Ask a dashboard for its version, first without the token."""
    path = f"{url.rstrip('/')}/api/version"
    bare = ask(path)
    if bare.status == 0:
        return Dashboard("away", bare.text)
    if bare.status == 200:
        return Dashboard("open" if "ray_version" in bare.text else "other", bare.text[:200])
    if bare.status not in (401, 403):
        return Dashboard("other", f"status {bare.status}")
    if not (token := ray_token()):
        return Dashboard("no token", bare.text[:200])
    ours = ask(path, headers={"Authorization": f"Bearer {token}"})
    if ours.status == 200 and "ray_version" in ours.text:
        return Dashboard("ready", ours.text[:200])
    return Dashboard("wrong token", f"status {ours.status}")
