"""`Client`: open-loop load, requests fixed before the run and sent when they are due, whatever the engine does.

A client that waited for answers would send less to a slow engine and so hide that it is slow (coordinated omission).
"""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import aiohttp
import numpy as np

from serving.bench.trace import Arrival


@dataclass(frozen=True)
class Outcome:
    """The answer to a request, or its error. All times are seconds after the start of the run."""

    arrival: Arrival
    first: float = math.nan
    """Time of the first token; NaN without any."""
    last: float = math.nan
    tokens: int = 0
    longest_gap: float = 0.0
    """Longest time between two of its tokens."""
    version: str = ""
    """Adapter version that answered, from the header `x-umbel-adapter`."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Return whether every token that was asked for has come."""
        return not self.error and self.tokens == self.arrival.output

    @property
    def ttft(self) -> float:
        """Return the time from the moment it was due to its first token, so that a late client is no excuse."""
        return self.first - self.arrival.at

    @property
    def tpot(self) -> float:
        """Return the mean time per token after the first; NaN for an answer of one token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan


class Client:
    """A streaming client of `/v1/completions`, whose prompts are random `prompt_ids`.

    It is light, because it shares a core with the HTTP process.
    """

    def __init__(self, url: str, model: str, prompt_ids: range, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=0))
        self._model, self._prompt_ids = model, prompt_ids

    async def run(self, workload: Sequence[Arrival], seed: int, drain_s: float, began: float) -> list[Outcome]:
        """Send every request when it is due; wait at most `drain_s` after the last one for open answers.

        The run starts at `began`, on the clock of `perf_counter`. `seed` draws the prompts; another seed draws others,
        which no cache knows.
        """
        rng = np.random.default_rng(seed)
        ids = self._prompt_ids
        prompts = [rng.integers(ids.start, ids.stop, arrival.prompt).tolist() for arrival in workload]
        end = began + max((arrival.at for arrival in workload), default=0.0) + drain_s
        tasks = [
            asyncio.create_task(self._send(arrival, prompt, began, end))
            for arrival, prompt in zip(workload, prompts, strict=True)
        ]
        return list(await asyncio.gather(*tasks))

    async def _send(self, arrival: Arrival, prompt: list[int], began: float, end: float) -> Outcome:
        await sleep_until(began + arrival.at)
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": arrival.output, "temperature": 0.0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            async with asyncio.timeout(end - time.perf_counter()):
                async with self._http.post("/v1/completions", json=body) as reply:
                    if reply.status != 200:
                        return Outcome(arrival, error=f"{reply.status}: {await reply.text()}")
                    return await _follow(reply, Outcome(arrival), began)
        except TimeoutError:
            return Outcome(arrival, error="no answer within the drain")
        except aiohttp.ClientError as error:
            return Outcome(arrival, error=repr(error))

    async def close(self) -> None:
        await self._http.close()


async def sleep_until(at: float) -> None:
    """Sleep until `at` on the clock of `perf_counter`, and never less.

    A timer of uvloop, which SGLang's processes use, counts from the begin of the loop's turn and may end early.
    """
    await asyncio.sleep(0)
    while (left := at - time.perf_counter()) > 0:
        await asyncio.sleep(left)


async def _follow(reply: aiohttp.ClientResponse, outcome: Outcome, began: float) -> Outcome:
    """Read a stream of server-sent events to its end, and complete the outcome with its times."""
    first = last = math.nan
    longest, tokens, error = 0.0, 0, ""
    async for line in reply.content:
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter() - began
        if b'"choices":[]' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        elif line.startswith(b'data: {"error"'):
            error = line.decode(errors="replace")
        else:
            first = now if math.isnan(first) else first
            longest = max(longest, now - last) if not math.isnan(last) else 0.0
            last = now
    version = reply.headers.get("x-umbel-adapter", "")
    return replace(outcome, first=first, last=last, tokens=tokens, longest_gap=longest, version=version, error=error)
