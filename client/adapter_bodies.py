"""`AdapterBodies`: receive adapters on the site's socket, one at a time, and none larger than the site can use."""

import asyncio

from fastapi import Request

from umbel.errors import WireError

ARRIVES_S = 120.0
"""Seconds within which a body has arrived, from when its turn has come; the sender has it in memory."""


class AdapterBodies:
    """Reads the bodies of one socket. While one is read the others wait, with only their headers in memory.

    A header that the centre signed can be sent again by anybody who opens the socket, so a signature does not bound
    what is sent after it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        """Bytes of the largest adapter that this site could load."""
        self._turn = asyncio.Lock()

    async def read(self, request: Request) -> bytes:
        """Return a request's body. Raises WireError for one that is too large, or has not arrived in ARRIVES_S."""
        said = request.headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:20]) > self.most:
            raise self._too_large()
        async with self._turn:
            try:
                async with asyncio.timeout(ARRIVES_S):
                    return await self._all(request)
            except TimeoutError as error:
                raise WireError(f"the adapter has not arrived within {ARRIVES_S:.0f} s; send it again") from error

    async def _all(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.most:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> WireError:
        return WireError(
            f"the adapter is over {self.most} bytes, the most that this site's layers have at [engine].max_lora_rank"
        )
