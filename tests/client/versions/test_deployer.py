"""The life of a version at a site, step by step, and what a daemon that is killed after any step serves."""

import asyncio
from pathlib import Path

import pytest

from client.versions.version_files import directory
from tests.toys.deployment import Deployment, adapter, manifest_of, quick, run, until
from tests.toys.engine import LOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def test_from_push_to_retirement_and_what_a_kill_would_leave_after_each_step(
    tmp_path: Path, machine: ToyMachine
) -> None:
    def kept(site: Deployment, live: str | None, previous: str | None, shadow: str | None) -> None:
        table, serving = site.after_a_kill()
        assert table.adapters == {"support": {"live": live, "previous": previous, "shadow": shadow}}
        assert table == site.table() == site.engine.router.table  # type: ignore[union-attr]
        assert serving == sorted(ref for ref in (live, previous) if ref) == sorted(table.addressable)
        assert site.engine.answers("support") == live

    async def story(site: Deployment) -> None:
        await site.ready()
        kept(site, None, None, None)
        site.jobs.losses = {"base": 3.0, "support-v1": 2.0, "support-v2": 1.0, "support-v3": 5.0}
        assert site.push(1) == V1
        assert site.deployer.report(V1).state is Lifecycle.CANDIDATE
        kept(site, None, None, None)
        report = await site.judged(V1)
        assert {role: found.loss for role, found in report.probe.items()} == {"base": 3.0, "shadow": 2.0}
        assert (report.state, report.verdict is not None and report.verdict.accepted) == (Lifecycle.JUDGED, True)
        kept(site, None, None, "support@v1")
        assert (await site.deployer.promote(V1)).state is Lifecycle.LIVE
        kept(site, "support@v1", None, None)
        await site.deploy(2)
        kept(site, "support@v2", "support@v1", None)
        assert site.deployer.report(V1).state is Lifecycle.RETIRED
        site.push(3)
        report = await site.judged(V3)
        assert {role: found.loss for role, found in report.probe.items()} == {"base": 3.0, "live": 1.0, "shadow": 5.0}
        assert report.verdict is not None
        assert not report.verdict.accepted
        assert site.jobs.asked == ["base", "support-v1", "support-v2", "support-v3"], "each is measured once"
        kept(site, "support@v2", "support@v1", "support@v3")
        await site.deployer.promote(V3, forced=True)
        await site.quiet()
        kept(site, "support@v3", "support@v2", None)
        assert site.engine.adapters == {"support-v3", "support-v2"}
        assert not directory(site.config, V1).exists()

    run(tmp_path, machine, story)


def test_only_a_judged_shadow_is_promoted_and_the_control_api_says_409(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.jobs.gate = asyncio.Event()
        site.push(1)
        await until(lambda: site.deployer.report(V1).state is Lifecycle.PROBING)
        async with site.http() as http:
            early = await http.post("/adapters/support@v1/promote")
            assert (early.status_code, early.json()["error"]["type"]) == (409, "Conflict")
            assert "clinic-a: support@v1 is probing; only a judged shadow" in early.json()["error"]["message"]
            assert site.engine.answers("support") is None
            site.jobs.gate.set()
            await site.judged(V1)
            against = await http.post("/adapters/support@v1/promote")
            assert (against.status_code, against.json()["error"]["type"]) == (409, "Conflict")
            assert "support@v1: this site's own verdict is keep: held-out loss" in against.json()["error"]["message"]
            assert "with `umbel promote SITE_FILE support@v1`" in against.json()["error"]["message"]
            assert site.engine.answers("support") is None
            forced = await http.post("/adapters/support@v1/promote?forced=true")
            assert (forced.status_code, forced.json()["error"]["type"]) == (404, "NotFound")
            assert "has no parameter 'forced' on this socket" in forced.json()["error"]["message"]
            assert site.engine.answers("support") is None
            for _ in range(2):
                async with site.http(operator=True) as operator:
                    reply = await operator.post("/adapters/support@v1/promote?forced=true")
                assert (reply.status_code, reply.json()["state"]) == (200, "live")
            assert (await http.post("/adapters/support@v9/promote")).status_code == 404
            assert (await http.post("/adapters/support/promote")).status_code == 422
            assert (await http.post("/adapters/suport/rollback")).status_code == 404
            assert (await http.post("/adapters/support@v1/discard")).status_code == 409, "it answers users"
            assert (await http.get("/adapters/support@v1/shadow")).json()["state"] == "live"

    run(tmp_path, machine, story)


def test_pushing_the_same_version_again_says_how_it_stands(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        states = []
        site.jobs.losses = {"base": 3.0}
        for step in (site.judged, site.deployer.promote):
            site.push(1)
            await step(V1)
            states.append(site.deployer.receive(manifest_of(1, adapter(1)), adapter(1)).state)
        assert states == [Lifecycle.JUDGED, Lifecycle.LIVE]
        assert machine.calls[LOAD, "support-v1"] == 1

    run(tmp_path, machine, story)
