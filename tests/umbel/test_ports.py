"""Ports: whether a server can listen, in the system's words."""

import socket

import pytest

from umbel.ports import refusal


def test_a_port_is_refused_while_it_is_taken_and_free_afterwards() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal("127.0.0.1", port) == "Address already in use"
    assert refusal("127.0.0.1", port) == ""


@pytest.mark.parametrize(("port", "why"), [(65536, "a port is at most 65535"), (30000, "Cannot assign requested")])
def test_what_cannot_be_listened_on_has_a_reason_without_the_address(port: int, why: str) -> None:
    said = refusal("192.0.2.1", port)
    assert said.startswith(why)
    assert "192.0.2.1" not in said
