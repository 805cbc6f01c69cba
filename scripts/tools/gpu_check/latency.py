"""`Users`: streamed requests, one after the other from each of some users, and the latencies that they saw."""

import asyncio
import itertools
import time

import numpy as np

from scripts.tools.gpu_check.findings import Figures
from scripts.tools.gpu_check.site import BASE, CheckedSite
from serving.bench.load import Client, Outcome
from serving.bench.trace import Arrival

REQUEST = Arrival(0.0, prompt=32, output=24)
TOGETHER = 2
"""Users who ask at the same time: the engine decodes for one while it computes the prompt of another."""
DRAIN_S = 60.0


class Users:
    """Users of the base, whose prompts are random ids that no cache knows."""

    def __init__(self, site: CheckedSite) -> None:
        self._client = Client(site.engine.client.url, BASE, range(site.vocabulary))
        self._seeds = itertools.count(1)

    async def ask(self, at_least: int) -> list[Outcome]:
        """Ask again and again until `at_least` requests are answered; return all answers."""
        answered: list[Outcome] = []

        async def user() -> None:
            while len(answered) < at_least:
                answered.extend(await self._client.run((REQUEST,), next(self._seeds), DRAIN_S, time.perf_counter()))

        await asyncio.gather(*(user() for _ in range(TOGETHER)))
        return answered

    async def close(self) -> None:
        await self._client.close()


def figures(answered: list[Outcome]) -> Figures:
    """Return how many requests failed, and TTFT and TPOT of the others."""
    good = [outcome for outcome in answered if outcome.ok]
    return {
        "requests": len(answered),
        "failed": len(answered) - len(good),
        "ttft": _quantiles([outcome.ttft for outcome in good]),
        "tpot": _quantiles([outcome.tpot for outcome in good]),
    }


def _quantiles(seconds: list[float]) -> Figures:
    """Return P50, P95 and the largest of some durations, in milliseconds."""
    if not seconds:
        return {}
    ms = np.array(seconds) * 1e3
    return {"p50_ms": float(np.median(ms)), "p95_ms": float(np.quantile(ms, 0.95)), "max_ms": float(ms.max())}
