"""Adapters are received one after the other, in bounded memory and time."""

import asyncio

import numpy as np
import pytest
from fastapi import Request

from client import adapter_bodies
from client.adapter_bodies import AdapterBodies
from umbel import peft_dir
from umbel.errors import WireError

SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (24, 16) for layer in range(40)}


class Sender:
    """A request whose body comes in pieces, each when it is let out; `read` counts the pieces that were taken."""

    def __init__(self, *pieces: bytes, length: str | None = None) -> None:
        self.pieces = list(pieces)
        self.read = 0
        self.more = asyncio.Event()
        headers = [] if length is None else [(b"content-length", length.encode())]
        self.request = Request({"type": "http", "method": "POST", "headers": headers}, self.receive)

    async def receive(self) -> dict[str, object]:
        await self.more.wait()
        body, self.read = self.pieces.pop(0), self.read + 1
        return {"type": "http.request", "body": body, "more_body": bool(self.pieces)}


def test_the_second_body_is_not_begun_before_the_first_has_ended() -> None:
    async def main() -> None:
        bodies = AdapterBodies(8)
        first, second = Sender(b"ab", b"cd"), Sender(b"efgh")
        second.more.set()
        reads = [asyncio.create_task(bodies.read(one.request)) for one in (first, second)]
        await asyncio.sleep(0.05)
        assert (first.read, second.read) == (0, 0)
        first.more.set()
        assert await asyncio.gather(*reads) == [b"abcd", b"efgh"]

    asyncio.run(main())


def test_who_does_not_send_loses_the_turn_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_bodies, "ARRIVES_S", 0.05)

    async def main() -> None:
        bodies = AdapterBodies(8)
        silent, other = Sender(b"ab"), Sender(b"cd")
        other.more.set()
        lost = asyncio.create_task(bodies.read(silent.request))
        await asyncio.sleep(0)
        assert await bodies.read(other.request) == b"cd"
        with pytest.raises(WireError, match=r"has not arrived within .*send it again"):
            await lost

    asyncio.run(main())


@pytest.mark.parametrize("length", [None, "9", "9" * 40])
def test_a_body_that_is_too_large_is_refused_unread_where_it_says_so(length: str | None) -> None:
    async def main() -> int:
        sender = Sender(b"abcd", b"efgh", b"i", length=length)
        sender.more.set()
        with pytest.raises(WireError, match="over 8 bytes, the most that this site's layers have"):
            await AdapterBodies(8).read(sender.request)
        return sender.read

    assert asyncio.run(main()) == (3 if length is None else 0)


@pytest.mark.parametrize("rank", [1, 8])
def test_the_bound_is_above_the_widest_adapter_of_the_layers_and_close_to_it(rank: int) -> None:
    widest = peft_dir.encode(
        {
            peft_dir.key(module, factor): np.ones((rank, inner) if factor == "A" else (out, rank), np.float32)
            for module, (out, inner) in SHAPES.items()
            for factor in "AB"
        }
    )
    most = peft_dir.most_bytes(SHAPES, rank)
    assert len(widest) <= most <= len(widest) + 3000 * len(SHAPES)
