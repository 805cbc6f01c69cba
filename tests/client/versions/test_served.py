"""The alias table and the versions behind it: damaged ones are not among them."""

from pathlib import Path

import pytest

from client.journal import Journal
from client.versions.served import Served
from client.versions.version_files import directory
from tests.toys.deployment import Deployment, quick, run
from tests.toys.engine import ToyMachine, site_config
from tests.toys.sites.journal import make_live, manifest, report
from umbel import peft_dir
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import AdapterError

V1, V2 = (AdapterRef("support", version) for version in (1, 2))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def test_a_damaged_live_version_is_not_served(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        weights = directory(site.config, V1) / peft_dir.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
        with pytest.raises(AdapterError, match="damaged"):
            site.served.versions()

    run(tmp_path, machine, story)


def test_an_engine_that_starts_gets_no_damaged_version_and_a_probe_after_it_measures_anew(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.deploy(2)
        weights = directory(site.config, V2) / peft_dir.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
        site.jobs.asked.clear()
        await site.judged(site.push(3))
        assert "support-v2" not in site.jobs.asked, "its scores are known"
        table, versions = site.served.what_to_serve(())
        assert (table.adapters["support"]["live"], list(versions)) == ("support@v1", [V1])
        assert site.served.damages == 1
        assert site.served.recovered[0].startswith("support@v2 is damaged and was forgotten; support@v1 answers")
        site.jobs.asked.clear()
        await site.judged(site.push(4))
        assert set(site.jobs.asked) == {"base", "support-v1", "support-v4"}, "none of the earlier scores is used"

    run(tmp_path, machine, story)


def test_users_meet_a_shadow_only_while_it_is_watched_and_loaded(
    tmp_path: Path,
) -> None:
    watching = site_config(tmp_path).shadow.model_copy(update={"watch_s": 60.0, "canary_share": 0.5})
    config = site_config(tmp_path).model_copy(update={"shadow": watching})
    journal = Journal(tmp_path / "journal.sqlite3")
    make_live(journal, V1)
    journal.add(manifest(V2), report(V2))
    for state, loaded, canary in (
        (Lifecycle.PROBING, (V1, V2), {}),
        (Lifecycle.WATCHING, (V1, V2), {"support": 0.5}),
        (Lifecycle.WATCHING, (V1,), {}),
        (Lifecycle.JUDGED, (V1, V2), {}),
    ):
        if journal.get(V2).state is not state:
            journal.move(V2, report(V2, state))
        table = Served(config, journal, {}).table(loaded)
        assert table.canary == canary, (state, loaded)
        assert table.adapters["support"] == {"live": "support@v1", "previous": None, "shadow": "support@v2"}
        assert table.addressable == ("support@v1",)
