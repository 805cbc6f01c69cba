"""`Users`: the users of `scripts/bench_swap`, an open loop of streams, long prompts, aborts and wrong requests."""

import asyncio
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from serving.bench.load import sleep_until

MIX = {"stream": 0.5, "long": 0.12, "several": 0.1, "abort": 0.1, "too long": 0.06, "bad json": 0.06, "no model": 0.06}
"""Kind of request → its share."""
GOOD = ("stream", "long", "several")
"""Kinds that have to be answered."""
REFUSED = {"too long": {400, 413}, "bad json": {400}, "no model": {404}}
"""Kinds that have to be refused → the statuses that may be used for it."""
PROMPTS = [f"Return a list of {thing}" for thing in ("names", "lines", "keys", "files", "words", "items", "bytes")]
TOKENS = {"stream": 24, "long": 6, "several": 8, "abort": 48}


@dataclass(frozen=True)
class Answer:
    """The outcome of one request. Times in seconds on the clock of `perf_counter`."""

    kind: str
    prompt: str
    at: float
    """The time it was due."""
    version: str = ""
    first: float = math.nan
    """The time of its first token."""
    gaps: tuple[tuple[float, float], ...] = ()
    """(time, seconds) of the three longest waits between two of its tokens."""
    texts: tuple[str, ...] = ()
    trouble: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.at


@dataclass
class Users:
    """Arrivals are a Poisson process of `rate` requests per second; each is sent when it is due."""

    url: str
    rate: float
    seed: int = 0
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, until: float) -> None:
        """Send requests until `until` on the clock, then wait for the last answers."""
        rng = np.random.default_rng(self.seed)
        tasks: set[asyncio.Task[None]] = set()
        due = time.perf_counter()
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.url, connector=connector, timeout=timeout) as http:
            while (due := due + rng.exponential(1 / self.rate)) < until:
                await sleep_until(due)
                kind = str(rng.choice(list(MIX), p=list(MIX.values())))
                task = asyncio.create_task(self._send(http, kind, PROMPTS[rng.integers(len(PROMPTS))], due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _send(self, http: aiohttp.ClientSession, kind: str, prompt: str, due: float) -> None:
        answer = Answer(kind, prompt, due)
        try:
            if kind in REFUSED:
                self.answers.append(await _refused(http, answer))
            elif kind == "several":
                self.answers.append(await _several(http, answer))
            else:
                self.answers.append(await _stream(http, answer))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers.append(Answer(kind, prompt, due, trouble=repr(error)))

    def failed(self) -> list[Answer]:
        """Return the requests that were not answered, or not refused, as they had to be."""
        return [answer for answer in self.answers if answer.trouble]

    def mixed(self) -> list[str]:
        """Describe each version that gave several answers to one prompt: with greedy decoding it has only one."""
        said: dict[tuple[str, str, str], Counter[str]] = {}
        for answer in self.answers:
            if answer.kind in GOOD and not answer.trouble:
                said.setdefault((answer.kind, answer.version, answer.prompt), Counter()).update(answer.texts)
        return [f"{version} to {kind} {prompt!r}: {len(texts)} answers"
                for (kind, version, prompt), texts in said.items() if len(texts) > 1]  # fmt: skip


def body(kind: str, prompt: str) -> dict[str, Any]:
    """Return the body of a request of a kind."""
    long = {"long": 40, "too long": 400}.get(kind, 0)
    return {
        "model": "nobody" if kind == "no model" else "support", "prompt": "and then " * long + prompt,
        "max_tokens": TOKENS.get(kind, 4), "temperature": 0, "ignore_eos": True,
    }  # fmt: skip


async def _refused(http: aiohttp.ClientSession, answer: Answer) -> Answer:
    data = b'{"model": "support", ' if answer.kind == "bad json" else json.dumps(body(answer.kind, answer.prompt))
    async with http.post("/v1/completions", data=data, headers={"content-type": "application/json"}) as reply:
        ok = reply.status in REFUSED[answer.kind] and "error" in await reply.text()
        return Answer(answer.kind, answer.prompt, answer.at, trouble="" if ok else f"status {reply.status}")


async def _several(http: aiohttp.ClientSession, answer: Answer) -> Answer:
    async with http.post("/v1/completions", json={**body(answer.kind, answer.prompt), "n": 2}) as reply:
        text, version = await reply.text(), reply.headers.get("x-umbel-adapter", "")
    choices = json.loads(text)["choices"] if reply.status == 200 else []
    trouble = "" if len(choices) == 2 and version else f"status {reply.status}: {text[:80]}"
    texts = tuple(choice["text"] for choice in choices)
    return Answer(answer.kind, answer.prompt, answer.at, version, texts=texts, trouble=trouble)


async def _stream(http: aiohttp.ClientSession, answer: Answer) -> Answer:
    first, last, ended = math.nan, math.nan, False
    gaps: list[tuple[float, float]] = []
    pieces: list[str] = []
    async with http.post("/v1/completions", json={**body(answer.kind, answer.prompt), "stream": True}) as reply:
        version = reply.headers.get("x-umbel-adapter", "")
        async for line in reply.content:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: {"):
                now = time.perf_counter()
                if math.isnan(first):
                    first = now
                else:
                    gaps.append((now, now - last))
                last = now
                pieces.append("".join(choice["text"] for choice in json.loads(line[6:]).get("choices", ())))
                if answer.kind == "abort" and len(pieces) == 3:
                    ended = True
                    break
    good = reply.status == 200 and ended and version
    longest = tuple(sorted(gaps, key=lambda gap: gap[1])[-3:])
    return Answer(
        answer.kind, answer.prompt, answer.at, version, first, longest, ("".join(pieces),),
        "" if good else f"status {reply.status}, {len(pieces)} pieces, {'ended' if ended else 'cut off'}",
    )  # fmt: skip
