"""`report`: the answer of GET /status: live versions, since when and why, the rounds, how training stands."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import httpx

from client import journal_view
from client.data.in_use import DataInUse
from client.data.prepare import Prepared
from client.data.summary import warnings
from client.tenant import Tenant
from client.versions.served import Served
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient
from umbel.errors import EngineError, TrainingError
from umbel.site.config import SiteConfig

TIMEOUT_S = 3.0
"""Limit for each question to the engine: it answers between two iterations, and a stuck one must not block the rest."""


async def report(
    config: SiteConfig,
    tenants: Iterable[Tenant],
    worths: Mapping[str, float],
    supervisor: Supervisor,
    served: Served,
    cotrainer: CoTrainerClient,
) -> dict[str, Any]:
    """Return the status as JSON values, for `umbel status` and for the metrics; most of it by adapter."""
    engine, tenants = supervisor.engine, list(tenants)
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
        "in_flight": await _in_flight(supervisor),
        "training": await _training(supervisor, cotrainer),
        "training_shares": {tenant.name: {"share": tenant.share, "worth": worths[tenant.name]} for tenant in tenants},
        "running_rounds": {
            tenant.name: json.loads(running.model_dump_json())  # a loss that is not a number is a string
            for tenant in tenants
            if engine and (running := tenant.jobs.running)
        },
        "data": {tenant.name: data(config, tenant.name, tenant.fresh.data) for tenant in tenants},
        "heldout_looks": {tenant.name: looks(config, tenant.name, tenant.prepared) for tenant in tenants},
        "worth": {tenant.name: tenant.jobs.measured.told for tenant in tenants},
        "recovered": served.recovered,
        "traffic": await _traffic(supervisor),
    }


def data(config: SiteConfig, adapter: str, in_use: DataInUse) -> dict[str, Any]:
    """Return the figures about an adapter's prepared examples, and what of them will bite; no text of theirs."""
    prepared = in_use.current
    return {
        "train": prepared.train_examples,
        "held_out": prepared.eval_examples,
        "withheld": sum(prepared.withheld.values()),
        "cut": prepared.cut,
        "dropped": prepared.dropped,
        "untold": prepared.untold,
        "files": {name: asdict(summary) for name, summary in prepared.files.items()},
        "asked": {name: asdict(asked) for name, asked in prepared.asked.items()},
        "will_bite": warnings(config, adapter, prepared.files, prepared.asked, prepared.withheld),
        "refused": in_use.refused,
        "rounds_wait": in_use.rounds_wait,
    }


def looks(config: SiteConfig, adapter: str, prepared: Prepared) -> dict[str, Any]:
    """Return the number of verdicts by an adapter's present held-out examples, and what the next one asks."""
    alpha = (1 - config.shadow.confidence) / 2
    look = journal_view.next_look(config.site.state_dir / "journal.sqlite3", adapter, prepared.heldout)
    return {
        "verdicts": look.number - 1,
        "since_promotion": look.since - 1,
        "next_level": look.level(alpha),
        "due": look.due(alpha),
    }


async def _traffic(supervisor: Supervisor) -> dict[str, Any] | None:
    """Return the counts of answers by version, without those of single users."""
    engine = supervisor.engine
    if engine is None:
        return None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            traffic = await engine.client.traffic()
    except (TimeoutError, EngineError, httpx.HTTPError) as error:  # an engine that is dying
        late = f"{engine.client.url}: no answer within {TIMEOUT_S:g} s"
        return {"error": late if isinstance(error, TimeoutError) else str(error) or type(error).__name__}
    return traffic.model_dump(mode="json", exclude={"versions": {"__all__": {"by_user"}}})


async def _in_flight(supervisor: Supervisor) -> dict[str, int]:
    """Return each version → number of requests it is answering; empty for an engine that is dying."""
    engine = supervisor.engine
    if engine is None:
        return {}
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await engine.client.in_flight()
    except (TimeoutError, EngineError, httpx.HTTPError):  # `traffic` says what is wrong
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
