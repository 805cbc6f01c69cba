"""The life of a version at a site, step by step, and what a daemon that is killed after any step serves."""

import asyncio
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from client.versions.version_files import directory
from tests.toys.deployment import BASE, RANK, Deployment, adapter, manifest_of, quick, run, until
from tests.toys.engine import GENERATE, LOAD, UNLOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import AdapterError, BaseMismatch, Conflict, NotFound
from umbel.messages import ShadowState

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
        assert table == site.deployer.loading.table() == site.engine.router.table  # type: ignore[union-attr]
        assert serving == sorted(ref for ref in (live, previous) if ref) == sorted(table.addressable)
        assert site.engine.answers("support") == live

    async def story(site: Deployment) -> None:
        await site.ready()
        kept(site, None, None, None)
        site.jobs.losses = {"base": 3.0, "support-v1": 2.0, "support-v2": 1.0, "support-v3": 5.0}
        assert site.push(1) == V1
        assert site.deployer.report(V1).state is ShadowState.VALIDATING
        kept(site, None, None, None)
        report = await site.judged(V1)
        assert {role: found.loss for role, found in report.probe.items()} == {"base": 3.0, "shadow": 2.0}
        assert (report.state, report.verdict is not None and report.verdict.accepted) == (ShadowState.JUDGED, True)
        kept(site, None, None, "support@v1")
        assert (await site.deployer.promote(V1)).state is ShadowState.LIVE
        kept(site, "support@v1", None, None)
        await site.deploy(2)
        kept(site, "support@v2", "support@v1", None)
        assert site.deployer.report(V1).state is ShadowState.RETIRED
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
        await until(lambda: site.deployer.report(V1).state is ShadowState.PROBING)
        async with site.http() as http:
            early = await http.post("/adapters/support@v1/promote")
            assert (early.status_code, early.json()["error"]["type"]) == (409, "Conflict")
            assert "clinic-a: support@v1 is shadow (probing); only a judged shadow" in early.json()["error"]["message"]
            assert site.engine.answers("support") is None
            site.jobs.gate.set()
            await site.judged(V1)
            against = await http.post("/adapters/support@v1/promote")
            assert (against.status_code, against.json()["error"]["type"]) == (409, "Conflict")
            assert "support@v1: this site's own verdict is keep: held-out loss" in against.json()["error"]["message"]
            assert "with `umbel promote SITE_FILE support@v1`" in against.json()["error"]["message"]
            assert site.engine.answers("support") is None
            for _ in range(2):
                reply = await http.post("/adapters/support@v1/promote?forced=true")
                assert (reply.status_code, reply.json()["state"]) == (200, "live")
            assert (await http.post("/adapters/support@v9/promote")).status_code == 404
            assert (await http.post("/adapters/support/promote")).status_code == 422
            assert (await http.post("/adapters/suport/rollback")).status_code == 404
            assert (await http.post("/adapters/support@v1/discard")).status_code == 409, "it answers users"
            assert (await http.get("/adapters/support@v1/shadow")).json()["state"] == "live"

    run(tmp_path, machine, story)


def test_a_discarded_shadow_is_gone_for_good_and_discarding_it_twice_is_no_change(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.push(2)
        await site.judged(V2)
        first = await site.deployer.discard(V2, "no quorum")
        assert first.verdict is not None
        assert (first.verdict.accepted, first.verdict.reasons[0]) == (False, "no quorum")
        assert await site.deployer.discard(V2, "another reason") == first
        await site.quiet()
        assert (site.engine.adapters, directory(site.config, V2).exists()) == ({"support-v1"}, False)
        assert machine.calls[UNLOAD, "support-v2"] == 1
        with pytest.raises(Conflict, match="rejected"):
            await site.deployer.promote(V2)
        assert site.push(2) == V2
        assert site.deployer.report(V2) == first, "pushed again, it is what it was"
        assert machine.calls[LOAD, "support-v2"] == 1
        assert site.engine.answers("support") == "support@v1"
        assert site.after_a_kill()[1] == ["support@v1"]

    run(tmp_path, machine, story)


def test_a_newer_push_supersedes_a_shadow(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            site.push(version)
            await site.judged(AdapterRef("support", version))
        await site.quiet()
        old = site.deployer.report(V1)
        assert old.verdict is not None
        assert (old.state, old.verdict.reasons[0]) == (ShadowState.REJECTED, "superseded by support@v2")
        assert site.deployer.loading.table().adapters["support"]["shadow"] == "support@v2"
        assert site.engine.adapters == {"support-v2"}

    run(tmp_path, machine, story)


def test_the_first_version_can_be_taken_back(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        assert await site.deployer.roll_back("support") is None
        assert (site.engine.answers("support"), site.engine.answers("support@previous")) == (None, "support@v1")
        assert site.after_a_kill()[0].adapters["support"]["live"] is None
        assert await site.deployer.roll_back("support") == "support@v1"
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_rolling_back_twice_comes_back(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        with pytest.raises(NotFound, match="nothing to roll back to"):
            await site.deployer.roll_back("support")
        for version in (1, 2, 3):
            await site.deploy(version)
        for live, previous in (("support@v2", "support@v3"), ("support@v3", "support@v2")):
            assert await site.deployer.roll_back("support") == live
            assert (site.engine.answers("support"), site.engine.answers("support@previous")) == (live, previous)
            assert site.after_a_kill()[0].adapters["support"]["live"] == live
        await site.quiet()
        assert site.engine.adapters == {"support-v3", "support-v2"}
        assert site.journal.history("support", limit=1)[0][1] == "live again by roll-back"

    run(tmp_path, machine, story)


REFUSALS: list[tuple[str, bytes, dict[str, Any], type[Exception], str]] = [
    ("NaN", adapter(9, value=np.nan), {}, AdapterError, "NaN"),
    ("infinity", adapter(9, value=np.inf), {}, AdapterError, "infinity"),
    ("shape", adapter(9, rank=RANK + 1), {}, AdapterError, "has shape"),
    ("rank", adapter(9, rank=5), {"rank": 5}, AdapterError, "rank 5 is not within 1..4"),
    ("dtype", adapter(9, ml_dtypes.bfloat16), {}, AdapterError, "is bfloat16, this site serves float32"),
    ("base", adapter(9), {"base": "f" * 64}, BaseMismatch, f"this site holds {BASE.digest[:12]}"),
    ("name", adapter(9), {"name": "other"}, AdapterError, "this site serves support"),
    ("digest", adapter(9), {"digest": "f" * 64}, AdapterError, "not those of its manifest"),
    ("bytes", b"junk", {}, AdapterError, "not a safetensors file"),
    ("reused", adapter(9), {"version": 1}, Conflict, "support@v1 is already here with other weights"),
]


@pytest.mark.parametrize(
    ("blob", "changes", "error", "reason"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS]
)
def test_a_bad_adapter_is_refused_before_anything_is_stored_or_loaded(
    tmp_path: Path, machine: ToyMachine, blob: bytes, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        before, files, calls = site.after_a_kill(), sorted((tmp_path / "adapters").rglob("*")), machine.calls.copy()
        with pytest.raises(error, match=reason):
            site.deployer.receive("support", manifest_of(**{"version": 9, "blob": blob, **changes}), blob)
        await site.quiet()
        assert (site.after_a_kill(), sorted((tmp_path / "adapters").rglob("*"))) == (before, files)
        assert machine.calls == calls, "the engine has heard nothing of it"
        assert site.engine.answers("support") == "support@v1"
        assert [version.ref for version in site.journal.versions()] == [V1]

    run(tmp_path, machine, story)


def test_pushing_the_same_version_again_says_how_it_stands(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        states = []
        site.jobs.losses = {"base": 3.0}
        for step in (site.judged, site.deployer.promote):
            site.push(1)
            await step(V1)
            states.append(site.deployer.receive("support", manifest_of(1, adapter(1)), adapter(1)).state)
        assert states == [ShadowState.JUDGED, ShadowState.LIVE]
        assert machine.calls[LOAD, "support-v1"] == 1

    run(tmp_path, machine, story)


@pytest.mark.parametrize("path", [LOAD, GENERATE])
def test_what_the_engine_refuses_is_rejected_with_its_reason(tmp_path: Path, machine: ToyMachine, path: str) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        machine.refuse[path] = "no room for it"
        report = await site.judged(site.push(2))
        assert report.verdict is not None
        assert (report.state, "no room for it" in report.verdict.reasons[0]) == (ShadowState.REJECTED, True)
        await site.quiet()
        assert site.engine.answers("support") == "support@v1"
        assert not directory(site.config, V2).exists()
        assert [v.ref for v in site.journal.versions(Lifecycle.REJECTED)] == [V2]

    run(tmp_path, machine, story)
