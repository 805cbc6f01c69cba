"""Open-loop load: arrivals fixed before the run, sent when they are due, whatever the engine does meanwhile.

A client that waited for answers would send less to a slow engine and so hide that it is slow (coordinated omission).
"""

import asyncio
import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import aiohttp
import numpy as np
import numpy.typing as npt

from serving.bench.domain import FIRST_SYMBOL
from umbel.errors import ConfigError

SCALE = 16
"""The trace's lengths are divided by it: a tiny model on a core is that much slower."""
MAX_PROMPT, MAX_OUTPUT = 256, 32
BURST_CV = 4.0
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
NO_TRACE = "no trace was given: lengths are drawn from log-normal distributions fitted to the Azure conversation trace"
FITTED = ((1020.0, 0.77), (129.0, 0.93))
"""Median and sigma of log-normal prompt and output lengths, from the published quantiles of the Azure 2023 trace."""


@dataclass(frozen=True)
class Arrival:
    at: float
    """Seconds after the start of the run."""
    prompt: int
    output: int
    """Tokens."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request. All times are seconds after the start of the run."""

    arrival: Arrival
    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    longest_gap: float = 0.0
    """Between two of its tokens."""
    version: str = ""
    """Which adapter answered."""
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.tokens == self.arrival.output

    @property
    def ttft(self) -> float:
        """From when it was due, so that a late client is no excuse."""
        return self.first - self.arrival.at

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; NaN for an answer of one token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan


class Trace:
    """Requests of a trace file, or lengths fitted to one, as material for workloads."""

    def __init__(self, seconds: npt.NDArray[np.float64], prompts: Sequence[int], outputs: Sequence[int]) -> None:
        self.seconds = seconds
        self.lengths = [
            (min(max(1, prompt // SCALE), MAX_PROMPT), min(max(1, output // SCALE), MAX_OUTPUT))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Read a CSV in the format of the Azure LLM inference traces; raise ConfigError for anything else."""
        try:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
            prompts, outputs = ([int(row[column]) for row in rows] for column in COLUMNS[1:])
        except (OSError, KeyError, TypeError, ValueError) as error:
            wanted = ", ".join(COLUMNS)
            raise ConfigError(f"{path}: not a trace ({error!r}); expected a CSV with columns {wanted}") from error
        if len(rows) < 2:
            raise ConfigError(f"{path}: a trace of {len(rows)} requests is none")
        return cls(np.array(times) - times[0], prompts, outputs)

    @classmethod
    def fitted(cls, requests: int = 20_000) -> "Trace":
        """Poisson arrivals and log-normal lengths, for want of a trace."""
        rng = np.random.default_rng(0)
        prompts, outputs = (rng.lognormal(math.log(median), sigma, requests).astype(int) for median, sigma in FITTED)
        return cls(np.cumsum(rng.exponential(1.0, requests)), prompts.tolist(), outputs.tolist())

    def replay(self, rate: float, seconds: float, start: float) -> tuple[Arrival, ...]:
        """`rate · seconds` consecutive requests from the fraction `start` of the trace on, fitted into `seconds`."""
        count = max(1, round(rate * seconds))
        first = int(start * len(self.lengths)) % max(1, len(self.lengths) - count - 1)
        if first + count >= len(self.lengths):
            raise ConfigError(f"the trace has {len(self.lengths)} requests, fewer than the {count} of one run")
        times = self.seconds[first : first + count + 1] - self.seconds[first]
        times = times / max(times[-1], 1e-9) * seconds
        return tuple(Arrival(float(times[n]), *self.lengths[first + n]) for n in range(count))

    def poisson(self, rate: float, seconds: float, seed: int) -> tuple[Arrival, ...]:
        return self.gamma(rate, seconds, seed, cv=1.0)

    def gamma(self, rate: float, seconds: float, seed: int, cv: float = BURST_CV) -> tuple[Arrival, ...]:
        """Inter-arrival times with a coefficient of variation of `cv`: above 1 they come in bursts."""
        rng = np.random.default_rng(seed)
        gaps = rng.gamma(cv**-2, cv**2 / rate, max(64, math.ceil(4 * rate * seconds)))
        return self._with_lengths([float(at) for at in np.cumsum(gaps) if at < seconds], rng)

    def square(self, low: float, high: float, seconds: float, period: float, seed: int) -> tuple[Arrival, ...]:
        """Poisson at the rate `low` in the first half of each period and `high` in the second."""
        rng = np.random.default_rng(seed)
        times = np.sort(rng.uniform(0, seconds, rng.poisson(high * seconds)))
        kept = [float(at) for at in times if at % period >= period / 2 or rng.uniform() < low / high]
        return self._with_lengths(kept, rng)

    def _with_lengths(self, times: list[float], rng: np.random.Generator) -> tuple[Arrival, ...]:
        return tuple(Arrival(at, *self.lengths[rng.integers(len(self.lengths))]) for at in times)


class Client:
    """A streaming client of `/v1/completions`, as light as it can be: it shares a core with HTTP."""

    def __init__(self, url: str, model: str, symbols: int, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=0))
        self._model, self._symbols = model, symbols

    async def run(self, workload: Sequence[Arrival], seed: int, drain_s: float, began: float) -> list[Outcome]:
        """Send every request when it is due; wait at most `drain_s` after the last for what is still open.

        The run starts at `began`, on the clock of `perf_counter`.
        `seed` draws the prompts: those of another run are others, so that no cache knows them.
        """
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(FIRST_SYMBOL, FIRST_SYMBOL + self._symbols, a.prompt).tolist() for a in workload]
        end = began + max((arrival.at for arrival in workload), default=0.0) + drain_s
        tasks = [
            asyncio.create_task(self._send(arrival, prompt, began, end))
            for arrival, prompt in zip(workload, prompts, strict=True)
        ]
        return list(await asyncio.gather(*tasks))

    async def _send(self, arrival: Arrival, prompt: list[int], began: float, end: float) -> Outcome:
        await asyncio.sleep(began + arrival.at - time.perf_counter())
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


async def _follow(reply: aiohttp.ClientResponse, outcome: Outcome, began: float) -> Outcome:
    """Read a stream of server-sent events to its end."""
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
