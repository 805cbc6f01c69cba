"""What GET /status says: which version answers, since when and why, what is waiting, how training stands."""

import asyncio
import json
from typing import Any

import httpx

from client import journal_view
from client.versions.deployer import Deployer
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient
from umbel.config import SiteConfig
from umbel.errors import EngineError, TrainingError

TIMEOUT_S = 3.0
"""The engine and its co-trainer answer between two iterations; the rest of the answer does not wait for a stuck one."""


async def report(
    config: SiteConfig, supervisor: Supervisor, deployer: Deployer, cotrainer: CoTrainerClient
) -> dict[str, Any]:
    """JSON values. `umbel status` shows them, and the metrics are made from them."""
    engine = supervisor.engine
    journal = config.site.state_dir / "journal.sqlite3"
    return {
        "site": config.site.name,
        "running": True,
        "engine": {
            "ready": engine is not None,
            "starts": supervisor.starts,
            "since": supervisor.started_at if engine else None,
            "url": engine.client.url if engine else None,
        },
        **journal_view.read(journal, config.adapters),
        "aliases": deployer.loading.table().model_dump(mode="json")["adapters"],
        "in_flight": await _in_flight(supervisor),
        "training": await _training(supervisor, cotrainer),
        "recovered": deployer.recovered,
        "traffic": await _traffic(supervisor),
    }


async def _traffic(supervisor: Supervisor) -> dict[str, Any] | None:
    """Counts of what users got of each version; the latencies are for comparing, and many."""
    engine = supervisor.engine
    if engine is None:
        return None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            traffic = await engine.client.traffic()
    except (TimeoutError, EngineError, httpx.HTTPError) as error:  # an engine that is dying
        return {"error": str(error)}
    return traffic.model_dump(mode="json", exclude={"versions": {"__all__": {"ttft_s", "tpot_s"}}})


async def _in_flight(supervisor: Supervisor) -> dict[str, int]:
    """Version → requests that it is answering; empty for an engine that is dying."""
    engine = supervisor.engine
    if engine is None:
        return {}
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await engine.client.in_flight()
    except (TimeoutError, httpx.HTTPError):
        return {}


async def _training(supervisor: Supervisor, cotrainer: CoTrainerClient) -> dict[str, Any] | None:
    if supervisor.engine is None:
        return None
    try:
        status = await cotrainer.status(TIMEOUT_S)
    except TrainingError as error:  # an engine that is dying; the rest of the answer is still true
        return {"job": None, "error": str(error)}
    plain: dict[str, Any] = json.loads(status.model_dump_json())  # a loss that is not a number is a string
    return plain
