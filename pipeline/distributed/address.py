"""Ray's address: looked at and tried before anything is read, made or waited for."""

from __future__ import annotations

import contextlib
import os
import socket
from urllib.parse import urlsplit

PATIENCE = 5.0  # seconds that a head has to take a connection; Ray itself waits for minutes


SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2, section 6.5: length 0, type 4


class AddressError(ValueError):
    """``RAY_ADDRESS`` is not the address of a cluster that a process can join."""


def check_address(address: str | None = None) -> None:
    """Refuse an address that Ray would refuse late, or wait for.

    Args:
        address: Default: ``RAY_ADDRESS``. Empty, ``local`` and ``auto`` are left to Ray.

    Raises:
        AddressError: It is a dashboard's or another server's, or not of a kind that is known.
        ConnectionError: Nobody takes connections there within 5 s.
    """
    address = os.environ.get("RAY_ADDRESS", "") if address is None else address
    if address in ("", "local", "auto"):
        return
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    if parts.scheme in ("http", "https"):
        raise AddressError(
            f"RAY_ADDRESS must be a cluster's host:port (6379), got the dashboard {address}: "
            "cluster/submit.sh python -m pipeline... sends a command there; unset it to run here"
        )
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("gcs", "ray") or not host or not port:
        raise AddressError(
            f"RAY_ADDRESS must be host:port, ray://host:port, auto or local, got {address!r}"
        )
    try:
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            greeting = greet(connection)
    except OSError as error:
        why = "connection refused" if isinstance(error, ConnectionRefusedError) else str(error)
        raise ConnectionError(
            f"no Ray at RAY_ADDRESS={address} ({why}); unset it to run here, or start the head"
        ) from None
    if greeting is not None and greeting[3:4] != SETTINGS[3:4]:
        raise AddressError(
            f"RAY_ADDRESS must be the host:port of a cluster's head (6379), got {address}, where "
            "something else answers; unset it to run here"
        )


def greet(connection: socket.socket) -> bytes | None:
    """Say hello as gRPC does, which Ray speaks, and return the first frame's head.

    A server of HTTP/2 answers with its settings; a dashboard, a database or a web server with
    something else, or by hanging up. None: not asked, since the cluster uses TLS.
    """
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return None
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
    found = b""
    with contextlib.suppress(OSError):  # it waits for something else, or hangs up
        while len(found) < len(SETTINGS) and (more := connection.recv(len(SETTINGS))):
            found += more
    return found
