"""Why MLflow does not take or give something, in one line, and whether waiting can help."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

LONGEST = 600  # characters of a line


class RefusedError(ValueError):
    """MLflow refuses for good, until a setting or the database is changed."""


def reason(error: BaseException, uri: str) -> Exception:
    """Turn what MLflow raised into an error whose text is one line that a person can act on.

    Args:
        uri: Of the tracking server, which may hold a password; it is shown without.

    Returns:
        A ``RefusedError`` where waiting cannot help (another version's database, a wrong password,
        a certificate), or a ``ConnectionError`` (refused, away).
    """
    shown, text = without_password(uri), one_line(error, uri)
    low = text.lower()
    if "database schema" in low or "locate revision" in low or "db upgrade" in low:
        return RefusedError(
            f"MLflow at {shown}: its database schema is of another MLflow version; back it up, "
            f"then run: mlflow db upgrade {shown} (or install the version that made it): {text}"
        )
    if re.search(r"\b(401|403)\b|unauthenticated|permission_denied|not authenticated", low):
        return RefusedError(
            f"MLflow at {shown} refuses the user or password; set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN: {text}"
        )
    if "certificate" in low or "sslerror" in low:
        return RefusedError(
            f"MLflow at {shown}: its certificate is not trusted; set "
            f"MLFLOW_TRACKING_SERVER_CERT_PATH: {text}"
        )
    if "connection refused" in low or "errno 111" in low:
        return ConnectionError(f"MLflow at {shown}: connection refused, is the server started?")
    return ConnectionError(f"MLflow at {shown}: {text}")


def without_password(uri: str) -> str:
    """Drop user and password from a URI, to print, store and compare it."""
    if uri.startswith("sqlite"):
        return uri
    bare = re.sub(r"(?<=://)[^/?#]*@", "", uri)
    return re.sub(r"(?i)([?&][^=&]*(?:user|password|token)=)[^&]*", r"\1...", bare)


def one_line(error: BaseException, uri: str = "") -> str:
    """Write an error in one line, whole up to ``LONGEST`` characters, without passwords."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text.rpartition("Caused by ")[2]  # how requests wraps what really happened
    if password := urlsplit(uri).password:
        text = text.replace(password, "...")
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."
