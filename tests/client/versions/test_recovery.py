"""The start after a crash: cut-off pushes are not in the way, and files that nobody can ask for go."""

from pathlib import Path

import pytest

from client.versions.version_files import directory
from tests.toys.deployment import Deployment, adapter, quick, run
from tests.toys.engine import ToyMachine
from tests.toys.sites.journal import order
from umbel import peft_dir
from umbel.adapter import AdapterRef

V1, V2 = (AdapterRef("support", version) for version in (1, 2))


class Killed(BaseException):
    """The daemon ends at this line."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def test_files_of_a_push_that_a_kill_cut_off_are_not_in_the_way_of_the_next(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first(site: Deployment) -> None:
        def killed(*_: object) -> None:
            raise Killed

        monkeypatch.setattr(site.journal, "add", killed)
        with pytest.raises(Killed):
            site.push(1)
        assert directory(site.config, V1).exists()
        assert site.after_a_kill()[1] == []

    async def second(site: Deployment) -> None:
        peft_dir.write_durably(directory(site.config, V1) / peft_dir.WEIGHTS, b"half a file")
        await site.deploy(1)
        assert peft_dir.read(directory(site.config, V1))[0] == adapter(1)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_files_that_nobody_can_ask_for_are_removed_after_a_restart(tmp_path: Path, machine: ToyMachine) -> None:
    async def first(site: Deployment) -> None:
        for version in (1, 2, 3):
            await site.deploy(version)
        site.push(4)
        await site.judged(AdapterRef("support", 4))
        await site.deployer.discard(AdapterRef("support", 4))

    async def second(site: Deployment) -> None:
        for version in (1, 4):
            (tmp_path / "adapters" / f"support-v{version}").mkdir(exist_ok=True)
        site.resume()
        assert sorted(folder.name for folder in (tmp_path / "adapters").iterdir()) == ["support-v2", "support-v3"]

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_rounds_from_before_several_adapters_lie_in_their_adapters_folder_afterwards(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        site.journal.rounds("support").add(order("r1"))
        for name in ("r1", "unknown"):
            (tmp_path / "rounds" / name).mkdir(parents=True)
            (tmp_path / "rounds" / name / "parent.safetensors").write_bytes(b"weights")
        for _ in range(2):
            site.resume()
            files = [str(path.relative_to(tmp_path)) for path in (tmp_path / "rounds").rglob("*.safetensors")]
            assert files == ["rounds/support/r1/parent.safetensors"]

    run(tmp_path, machine, story)


def test_a_round_whose_key_is_the_name_of_an_adapter_takes_no_folder_of_it(tmp_path: Path, machine: ToyMachine) -> None:
    """A centre chooses the keys of its adapter's rounds, and another one's adapter may be called so."""

    async def story(site: Deployment) -> None:
        for name, key in (("support", "triage"), ("support", "support"), ("triage", "l-1-x")):
            site.journal.rounds(name).add(order(key))
        update = tmp_path / "rounds" / "triage" / "l-1-x" / "update.safetensors"
        update.parent.mkdir(parents=True)
        update.write_bytes(b"weights")
        site.resume()
        assert [path for path in (tmp_path / "rounds").rglob("*") if path.is_file()] == [update]

    run(tmp_path, machine, story)
