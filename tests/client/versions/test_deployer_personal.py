"""Versions that a site joins to its own part: what is loaded, probed, promoted, rolled back is the joined adapter."""

from pathlib import Path

import pytest

from client.rounds.personal import PersonalPart, join
from client.versions.version_files import directory
from tests.toys.deployment import RANK, SHAPES, Deployment, adapter, manifest_of, quick, run
from tests.toys.engine import LOAD, ToyMachine, site_config
from umbel import peft_dir
from umbel.adapter import AdapterRef, Lifecycle, Personal
from umbel.errors import AdapterError, Conflict

V1, V2 = (AdapterRef("support", version) for version in (1, 2))
B, OWN = Personal(part="B"), Personal(part="adapter", rank=2)
BOTH = pytest.mark.parametrize("personal", [B, OWN], ids=["fedsa", "dual"])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def own(personal: Personal, seed: int) -> peft_dir.Tensors:
    whole = peft_dir.decode(adapter(seed, rank=personal.rank or RANK))
    return whole if personal.part == "adapter" else {name: array for name, array in whole.items() if "lora_B" in name}


def keep(state_dir: Path, personal: Personal, seed: int) -> None:
    """Keep a personal part at the site, as a finished round does."""
    part = PersonalPart(site_config(state_dir), "support", "test", personal)
    part.keep(peft_dir.decode(adapter(1)), peft_dir.encode(own(personal, seed)))


def joined(version: int, personal: Personal, seed: int) -> bytes:
    return peft_dir.encode(join(peft_dir.decode(adapter(version)), own(personal, seed), personal))


@BOTH
def test_from_push_to_roll_back_the_joined_adapter_is_what_is_served(
    tmp_path: Path, machine: ToyMachine, personal: Personal
) -> None:
    async def story(site: Deployment) -> None:
        keep(tmp_path, personal, 71)
        site.push(1, personal=personal)
        assert (await site.judged(V1)).state is Lifecycle.JUDGED
        await site.deployer.promote(V1, forced=True)
        weights, manifest = peft_dir.read(directory(site.config, V1))
        assert weights == joined(1, personal, 71)
        assert manifest.rank == RANK + personal.rank
        peft_dir.validate(peft_dir.decode(weights), SHAPES, rank=manifest.rank, max_rank=4)
        known = site.journal.get(V1).manifest
        assert (known.digest, known.rank, known.personal) == (peft_dir.digest(adapter(1)), RANK, personal)

        keep(tmp_path, personal, 72)
        site.push(2, personal=personal)
        await site.judged(V2)
        await site.deployer.promote(V2, forced=True)
        assert peft_dir.read(directory(site.config, V2))[0] == joined(2, personal, 72), "with the part as it is by now"
        assert peft_dir.read(directory(site.config, V1))[0] == joined(1, personal, 71), "as it was promoted"
        assert site.after_a_kill()[1] == ["support@v1", "support@v2"]
        assert await site.deployer.roll_back() == "support@v1"
        assert site.engine.answers("support") == "support@v1"

    async def next_daemon(site: Deployment) -> None:
        assert site.engine.answers("support") == "support@v1"
        assert site.engine.adapters == {"support-v1", "support-v2"}
        assert peft_dir.read(directory(site.config, V1))[0] == joined(1, personal, 71)

    run(tmp_path, machine, story)
    run(tmp_path, machine, next_daemon)


def test_the_same_version_again_is_found_although_the_part_has_moved_meanwhile(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        keep(tmp_path, OWN, 71)
        site.push(1, personal=OWN)
        report = await site.judged(V1)
        keep(tmp_path, OWN, 72)
        again = site.deployer.receive(manifest_of(1, adapter(1), personal=OWN), adapter(1))
        assert again == report
        assert machine.calls[LOAD, "support-v1"] == 1
        assert peft_dir.read(directory(site.config, V1))[0] == joined(1, OWN, 71)
        with pytest.raises(Conflict, match="other weights"):
            site.deployer.receive(manifest_of(1, adapter(9), personal=OWN), adapter(9))

    run(tmp_path, machine, story)


@BOTH
def test_a_site_that_has_not_trained_yet_serves_what_it_received(
    tmp_path: Path, machine: ToyMachine, personal: Personal
) -> None:
    async def story(site: Deployment) -> None:
        site.push(1, personal=personal)
        await site.judged(V1)
        await site.deployer.promote(V1, forced=True)
        assert peft_dir.read(directory(site.config, V1))[0] == adapter(1)

    run(tmp_path, machine, story)


@pytest.mark.parametrize(
    ("rank", "blob", "reason"),
    [
        (3, adapter(1), "joined to one of rank 5, over .*max_lora_rank = 4"),
        (2, adapter(1, rank=1), "has shape"),
    ],
)
def test_a_version_that_cannot_be_joined_is_refused_before_anything_is_stored(
    tmp_path: Path, machine: ToyMachine, rank: int, blob: bytes, reason: str
) -> None:
    async def story(site: Deployment) -> None:
        manifest = manifest_of(1, blob, personal=Personal(part="adapter", rank=rank))
        with pytest.raises(AdapterError, match=reason):
            site.deployer.receive(manifest, blob)
        await site.quiet()
        assert not (tmp_path / "adapters").exists()
        assert site.journal.versions() == []

    run(tmp_path, machine, story)
