"""Ray's address is looked at before anything else, and nothing waits for a head that is gone."""

import socket
import time

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


def test_head_that_takes_connections_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")
