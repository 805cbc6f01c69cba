"""Versions in the running engine: loaded again after a death, warmed, and unloaded only when nobody needs them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from client.versions.version_files import directory
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import LOAD, UNLOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle

V1, V2 = (AdapterRef("support", version) for version in (1, 2))
V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def policy(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.setenv("UMBEL_SITE__SHADOW", json.dumps({"rollback_window_s": 600.0, **settings}))


def test_an_engine_that_dies_under_a_load_is_loaded_again(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        machine.gates[LOAD] = asyncio.Event()
        site.push(1)
        await until(lambda: machine.calls[LOAD, "support-v1"] == 1)
        machine.kill()
        machine.gates.pop(LOAD).set()
        assert (await site.judged(V1)).state is Lifecycle.JUDGED
        assert (site.supervisor.starts, site.engine.adapters) == (2, {"support-v1"})

    run(tmp_path, machine, story)


def test_a_judged_shadow_is_loaded_into_the_engine_that_is_there_now(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.push(1)
        await site.judged(V1)
        machine.kill()
        await site.ready(starts=2)
        assert site.engine.adapters == set()
        await site.deployer.promote(V1, forced=True)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_version_in_use_is_unloaded_only_after_its_last_request(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        assert site.engine.router is not None
        site.engine.router.in_flight["support@v1"] += 1
        for version in (2, 3):
            await site.deploy(version)
        await until(lambda: machine.calls["/umbel/inflight", ""] > 3)
        assert "support-v1" in site.engine.adapters
        assert directory(site.config, V1).exists()
        site.engine.router.in_flight["support@v1"] -= 1
        await site.quiet()
        assert site.engine.adapters == {"support-v2", "support-v3"}
        assert not directory(site.config, V1).exists()

    run(tmp_path, machine, story)


def test_a_shadow_that_is_discarded_while_it_loads_does_not_stay_in_the_engine(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        machine.gates["/generate"] = asyncio.Event()
        site.push(1)
        await until(lambda: machine.calls["/generate", "support-v1"] == 1)
        await site.deployer.discard(V1)
        machine.gates["/generate"].set()
        await site.quiet()
        assert site.engine.adapters == set()
        assert machine.calls[UNLOAD, "support-v1"] == 1

    run(tmp_path, machine, story)


def test_the_way_back_is_given_the_most_used_prompts_before_it_answers(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        chat = [{"role": "system", "content": "You are a nurse."}, {"role": "user", "content": "hello"}]
        await site.users("u", "v", messages=chat)
        await site.deploy(1)
        await site.deploy(2)
        await site.deployer.roll_back()
        prefilled = [version for version, body in machine.generated if body.get("max_tokens") == 1]
        assert prefilled == ["support-v1", "support-v2", "support-v1"]
        machine.refuse["/umbel/prefill"] = "busy"
        assert await site.deployer.roll_back() == "support@v2", "and it goes back without, too"

    run(tmp_path, machine, story)
