"""Ray's address is looked at before anything else, and nothing waits for a head that is gone."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from pipeline.distributed.address import AddressError, check_address


@pytest.mark.parametrize("address", ["", "local", "auto"])
def test_what_ray_finds_itself_is_left_to_it(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "cluster/submit.sh"),
        ("https://head:8265", "unset it to run here"),
        ("head", "must be host:port"),
        ("head:port", "must be host:port"),
        ("ftp://head:1", "must be host:port"),
    ],
)
def test_address_of_the_wrong_kind_is_refused(address: str, words: str) -> None:
    with pytest.raises(AddressError) as found:
        check_address(address)
    assert words in str(found.value)
    assert address in str(found.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_head_that_is_gone_is_said_within_seconds(scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"no Ray at RAY_ADDRESS={address} \(connection"):
        check_address(address)
    assert time.monotonic() - began < 10


@contextmanager
def answering(text: bytes) -> Iterator[str]:
    """Serve one connection, which gets this text whatever it says; yields the address."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(text)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def test_head_that_answers_as_grpc_does_passes() -> None:
    with answering(bytes([0, 0, 18, 4, 0, 0, 0, 0, 0]) + bytes(18)) as address:
        check_address(address)


def test_real_head_passes(tmp_path: Path) -> None:
    script = "import ray; print(ray.init(num_cpus=1, include_dashboard=False).address_info"
    script += "['gcs_address'], flush=True); input()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        check_address(address)
        head.stdin.close()


@pytest.mark.parametrize("text", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"N", b"-ERR\r\n"])
def test_server_of_another_kind_is_said_to_be_one(text: bytes) -> None:
    with answering(text) as address, pytest.raises(AddressError, match="something else answers"):
        check_address(address)


def test_server_that_says_nothing_is_left_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.distributed.address.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(AddressError, match="something else answers"):
            check_address(address)
