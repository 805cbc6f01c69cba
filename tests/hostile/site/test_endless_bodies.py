"""Bodies without an end on a real socket of the daemon: what is not signed is answered at once, and never held."""

import asyncio
import base64
import contextlib
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import daemon
from client.adapter_bodies import AdapterBodies
from client.control import group_api
from tests.toys.cotrainer import order
from tests.toys.deployment import Deployment, adapter, manifest_of
from umbel import signing
from umbel.messages import Submit

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([byte] * 32)) for byte in (1, 2))
MANIFEST, ORDER = manifest_of(1, adapter(1)), order("r1")
CHUNK = b"%x\r\n%s\r\n" % (1 << 20, bytes(1 << 20))
SENT_MIB = 256
MOST = 2 << 20
"""Bytes of the largest adapter that this site could load."""
MOST_HELD = 8 << 20
"""Bytes that the daemon may hold of a body, however long: what the operating system gives it in a few reads."""
PATHS = {"/adapters/support/rounds/r1": Submit(adapter="support", order=ORDER), "/adapters/support/shadow": MANIFEST}


@pytest.fixture
def listening(sockets: Path) -> Iterator[Path]:
    """The group's socket of a site that trusts KEY, served as the daemon serves it, by a thread."""
    made = Deployment(sockets)
    keys = made.deployer._keys
    keys._trusted = KEY.public_key()
    jobs = SimpleNamespace(submit=None)  # whoever called it would be answered with a 500
    site: Any = SimpleNamespace(
        config=made.config, tenant=partial(made.tenant, jobs=jobs), keys=keys, bodies=AdapterBodies(MOST)
    )
    server = daemon._server(group_api(site))
    path = sockets / "site.sock"
    with daemon._bound(path, shared=False) as listener:
        listener.listen()  # whoever is early waits
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield path
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
            made.journal.close()


def head(path: str, signature: str, length: str) -> bytes:
    coded = {"order": ORDER, "manifest": MANIFEST}
    headers = {
        f"x-umbel-{name}": base64.b64encode(one.model_dump_json().encode()).decode() for name, one in coded.items()
    }
    lines = [f"{name}: {value}" for name, value in {**headers, "x-umbel-signature": signature}.items()]
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: site", length, *lines, "", ""]).encode()


def connect(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(60)
    made.connect(str(path))
    return made


def answer(connection: socket.socket) -> bytes:
    """Return the answer, whose body is short, once it has come."""
    said = b""
    while b'"}}' not in said:
        more = connection.recv(65536)
        assert more, said
        said += more
    return said


@pytest.mark.parametrize("length", ["transfer-encoding: chunked", f"content-length: {4 << 30}"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("signed", ["", signing.sign(OTHER, MANIFEST)], ids=["unsigned", "another key"])
def test_a_bad_signature_is_answered_while_its_body_has_not_begun(
    listening: Path, path: str, signed: str, length: str
) -> None:
    with connect(listening) as connection:
        connection.sendall(head(path, signed, length))
        said = answer(connection)
    assert said.startswith(b"HTTP/1.1 422 "), said
    assert b'"type":"AdapterError"' in said


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_nobody_signed_is_never_held_however_long_it_is(listening: Path, path: str) -> None:
    with connect(listening) as connection:
        tracemalloc.start()
        try:
            connection.sendall(head(path, "", "transfer-encoding: chunked"))
            with contextlib.suppress(ConnectionError):  # it may hang up on who goes on after the answer
                for _ in range(SENT_MIB):
                    connection.sendall(CHUNK)
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert answer(connection).startswith(b"HTTP/1.1 422 ")
    assert held < MOST_HELD, f"{held} bytes of {SENT_MIB} MiB were held"
    with connect(listening) as other:
        other.sendall(head(path, "", "content-length: 0"))
        assert answer(other).startswith(b"HTTP/1.1 422 "), "it goes on answering"


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_the_centre_signed_is_waited_for(listening: Path, path: str) -> None:
    """So what is tested above is the signature's doing."""
    with connect(listening) as connection:
        connection.sendall(head(path, signing.sign(KEY, PATHS[path]), "content-length: 2"))
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)


@pytest.mark.parametrize("length", ["transfer-encoding: chunked", f"content-length: {MOST + 1}"])
@pytest.mark.parametrize("path", PATHS)
def test_a_signed_header_that_is_sent_again_lets_no_more_in_than_an_adapter(
    listening: Path, path: str, length: str
) -> None:
    with connect(listening) as connection:
        connection.sendall(head(path, signing.sign(KEY, PATHS[path]), length))
        if "chunked" in length:
            with contextlib.suppress(ConnectionError):
                for _ in range((MOST >> 20) + 1):
                    connection.sendall(CHUNK)
        said = answer(connection)
    assert said.startswith(b"HTTP/1.1 422 "), said
    assert f"the adapter is over {MOST} bytes".encode() in said
