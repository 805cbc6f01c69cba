"""Adapters that are only served come and go while users are answered; every request is answered by one of them."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.toys.deployment import PATIENCE_S, Deployment, quick, run, until
from tests.toys.engine import LOAD, ToyMachine
from tests.toys.sites.peft_directory import digest_of, peft_directory
from umbel import peft_dir
from umbel.adapter import ServedRef
from umbel.errors import AdapterError, ConfigError, Conflict, EngineError, NotFound
from umbel.site.adapter_sections import ServeSection


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


@pytest.fixture
def legal(tmp_path: Path) -> Path:
    return peft_directory(tmp_path / "legal")


def ref(folder: Path, name: str = "legal") -> str:
    return str(ServedRef.of(name, digest_of(folder)))


def start(
    tmp_path: Path,
    machine: ToyMachine,
    serve: dict[str, Path],
    story: Callable[[Deployment], Coroutine[Any, Any, None]],
) -> None:
    """Tell a story of a daemon whose site file has these [[serve]], from before its engine's start."""

    async def main() -> None:
        site = Deployment(tmp_path, machine, tuple(ServeSection(name=one, path=path) for one, path in serve.items()))
        try:
            await site.serve_only.apply_site_file()
            site.resume()
            async with asyncio.timeout(2 * PATIENCE_S), site:
                await site.ready()
                await story(site)
        finally:
            site.journal.close()

    asyncio.run(main())


def folders(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "served").iterdir()}


def test_an_adapter_is_loaded_beside_the_others_and_answers_by_its_name(
    tmp_path: Path, machine: ToyMachine, legal: Path
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.deploy(1)
        said = await site.serve_only.load("legal", legal)
        assert (said["digest"], said["path"], said["listed"]) == (digest_of(legal), str(legal), False)
        assert await site.users("a", model="legal") == await site.users("a", model="tiny:legal") == [ref(legal)]
        assert await site.users("a") == ["support@v1"]
        assert site.journal.imported.all()[0].shown == {key: said[key] for key in ("name", "digest", "path", "since")}

    run(tmp_path, machine, story)


def test_another_one_takes_its_place_and_a_request_ends_as_it_began(
    tmp_path: Path, machine: ToyMachine, legal: Path
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.serve_only.load("legal", legal)
        old, new = ref(legal), ref(other := peft_directory(tmp_path / "other", seed=1))
        machine.gates["answer"] = asyncio.Event()
        asking = asyncio.create_task(site.users("a", model="legal"))
        await until(lambda: site.engine.router is not None and site.engine.router.in_flight[old] == 1)
        await site.serve_only.load("legal", other)
        assert site.engine.answers("legal") == new
        await asyncio.sleep(0.03)
        assert ServedRef.parse(old).engine_name in site.engine.adapters, "it still answers a request"
        assert len(folders(tmp_path)) == 2
        machine.gates["answer"].set()
        assert await asking == [old]
        await site.quiet()
        assert site.engine.adapters == {ServedRef.parse(new).engine_name}
        assert folders(tmp_path) == {f"legal-{ServedRef.parse(new).digest}"}

    run(tmp_path, machine, story)


def test_one_that_is_unloaded_is_asked_for_in_vain(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.serve_only.load("legal", legal)
        await site.serve_only.unload("legal")
        await site.quiet()
        assert (await site.users("a", model="legal"), site.engine.adapters) == (["error"], set())
        assert (folders(tmp_path), site.journal.imported.all()) == (set(), [])
        with pytest.raises(NotFound, match="no adapter 'legal' is only served here; there is none"):
            await site.serve_only.unload("legal")

    run(tmp_path, machine, story)


def test_the_same_again_is_no_change(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        first = await site.serve_only.load("legal", legal)
        assert await site.serve_only.load("legal", legal) == first
        await site.quiet()
        assert machine.calls[LOAD, ServedRef.of("legal", digest_of(legal)).engine_name] == 1
        assert await site.users("a", model="legal") == [ref(legal)]

    run(tmp_path, machine, story)


def test_a_name_that_means_something_else_is_refused(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        for name, why in (("support", "is trained here"), ("tiny", "the name of the base")):
            with pytest.raises(Conflict, match=f"{name}.*{why}"):
                await site.serve_only.load(name, legal)
        with pytest.raises(AdapterError, match="name the directory by its whole path"):
            await site.serve_only.load("legal", Path("legal"))
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            await site.serve_only.load("../x", legal)
        assert not (tmp_path / "served").exists()

    run(tmp_path, machine, story)


def test_one_that_cannot_be_served_changes_nothing(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.serve_only.load("legal", legal)
        with pytest.raises(AdapterError, match="max_lora_rank is 4; set that to 9"):
            await site.serve_only.load("legal", peft_directory(tmp_path / "large", rank=9))
        machine.refuse[LOAD] = "out of memory"
        with pytest.raises(EngineError, match="out of memory"):
            await site.serve_only.load("legal", peft_directory(tmp_path / "other", seed=1))
        await site.quiet()
        assert await site.users("a", model="legal") == [ref(legal)]
        assert folders(tmp_path) == {f"legal-{digest_of(legal)[:16]}"}

    run(tmp_path, machine, story)


def test_a_new_engine_has_what_was_loaded(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.serve_only.load("legal", legal)
        machine.kill()
        await site.ready(starts=2)
        assert await site.users("a", model="legal") == [ref(legal)]

    run(tmp_path, machine, story)


def test_one_that_is_loaded_while_an_engine_starts_is_in_it(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        machine.gates["start"] = asyncio.Event()
        await until(lambda: len(machine.engines) == 1)
        await site.serve_only.load("legal", legal)
        machine.gates["start"].set()
        await site.ready()
        assert await site.users("a", model="legal") == [ref(legal)]

    run(tmp_path, machine, story)


def test_the_site_files_are_in_the_first_engine_and_go_when_they_leave_it(
    tmp_path: Path, machine: ToyMachine, legal: Path
) -> None:
    async def first(site: Deployment) -> None:
        assert await site.users("a", model="legal") == [ref(legal)]
        await site.serve_only.load("code", legal)
        assert (await site.serve_only.unload("legal"))["listed"], "it comes back"

    async def again(site: Deployment) -> None:
        assert await site.users("a", model="legal") == [ref(legal)]
        assert await site.users("a", model="code") == [ref(legal, "code")]

    async def without(site: Deployment) -> None:
        assert await site.users("a", model="legal") == ["error"]
        assert await site.users("a", model="code") == [ref(legal, "code")], "an operator loaded it"
        assert folders(tmp_path) == {f"code-{digest_of(legal)[:16]}"}

    start(tmp_path, machine, {"legal": legal}, first)
    start(tmp_path, machine, {"legal": legal}, again)
    start(tmp_path, machine, {}, without)


def test_a_changed_directory_is_served_as_it_is_now(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        assert await site.users("a", model="legal") == [ref(legal)]
        assert folders(tmp_path) == {f"legal-{digest_of(legal)[:16]}"}

    start(tmp_path, machine, {"legal": legal}, story)
    peft_directory(legal, seed=5)
    start(tmp_path, machine, {"legal": legal}, story)


def test_directories_that_cannot_be_read_stop_the_start_all_at_once(
    tmp_path: Path, machine: ToyMachine, legal: Path
) -> None:
    (legal / peft_dir.WEIGHTS).unlink()
    large = peft_directory(tmp_path / "large", rank=9)
    with pytest.raises(ConfigError, match=r"^\[\[serve\]\] legal: .*\n\[\[serve\]\] big: .*max_lora_rank is 4"):
        start(tmp_path, machine, {"legal": legal, "big": large}, lambda site: site.quiet())
    assert machine.engines == []


def test_a_name_that_is_trained_since_is_served_no_more(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def before(site: Deployment) -> None:
        await site.serve_only.load("legal", legal)

    async def after(site: Deployment) -> None:
        assert site.served.recovered[0].endswith("an adapter of that name is trained here, [[adapter]]")
        assert site.journal.imported.all() == []

    start(tmp_path, machine, {}, before)

    async def main() -> None:
        site = Deployment(tmp_path, machine)
        trained = site.config.adapter[0].model_copy(update={"name": "legal"})
        object.__setattr__(site.config, "adapter", (trained,))
        await site.serve_only.apply_site_file()
        await after(site)
        site.journal.close()

    asyncio.run(main())


def test_a_damaged_one_is_made_anew_before_an_engine_reads_it(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.serve_only.load("legal", legal)
        file = tmp_path / "served" / f"legal-{digest_of(legal)[:16]}" / peft_dir.WEIGHTS
        file.write_bytes(b"damaged")
        machine.kill()
        await site.ready(starts=2)
        assert await site.users("a", model="legal") == [ref(legal)]
        assert peft_dir.digest(file.read_bytes()) == digest_of(legal)
        assert "was made anew" in site.served.recovered[0]

    run(tmp_path, machine, story)


def test_the_operators_socket_loads_and_unloads_and_the_centres_does_not(
    tmp_path: Path, machine: ToyMachine, legal: Path
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        async with site.http(operator=True) as operator, site.http() as centre:
            asked = {"path": str(legal)}
            assert (await centre.post("/served/legal", params=asked)).status_code == 404
            assert (await operator.post("/served/support", params=asked)).status_code == 409
            assert (await operator.post("/served/legal", params={"path": "/nowhere"})).status_code == 422
            assert (await operator.post("/served/legal")).status_code == 422
            assert (await operator.post("/served/legal", params=asked)).json()["digest"] == digest_of(legal)
            assert await site.users("a", model="legal") == [ref(legal)]
            assert (await operator.delete("/served/legal")).json()["name"] == "legal"
            assert (await operator.delete("/served/legal")).status_code == 404

    run(tmp_path, machine, story)


def test_one_that_ends_the_engine_is_not_in_the_next_one(tmp_path: Path, machine: ToyMachine, legal: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        machine.gates[LOAD] = asyncio.Event()
        loading = asyncio.create_task(site.serve_only.load("legal", legal))
        await until(lambda: any(path == LOAD for path, _ in machine.calls))
        machine.kill()
        machine.gates.pop(LOAD).set()
        with pytest.raises(EngineError, match=r"the engine went away while legal@sha256:.* was loaded"):
            await loading
        await site.ready(starts=2)
        await site.quiet()
        assert (site.engine.adapters, site.journal.imported.all(), folders(tmp_path)) == (set(), [], set())

    run(tmp_path, machine, story)
