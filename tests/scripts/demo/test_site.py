"""A site of the demo: its site file, with the centre's keys and without, and a control API that is not there yet."""

from pathlib import Path

import pytest

from scripts.tools.certs import make as make_certs
from scripts.tools.demo.settings import SETTINGS
from scripts.tools.demo.site import DemoSite
from scripts.tools.processes import ENGINE_BIN, Processes
from umbel.site.config import SiteConfig


class Recorded(Processes):
    """Processes that are not started: the site answers at once."""

    def start(self, name: str, command: list[str], **environment: str) -> None:  # type: ignore[override]
        self.name, self.command = name, command

    def wait_for(self, *_: object) -> None: ...


def started(folder: Path, keys: Path | None, base: str = "tiny") -> tuple[DemoSite, SiteConfig, Recorded]:
    site, processes = (
        DemoSite("clinic-a", "clinic", folder / "clinic-a", keys, SETTINGS[base]),
        Recorded(folder / "logs"),
    )
    site.start(folder / "base", (folder / "train.jsonl", folder / "eval.jsonl"), processes)
    return site, SiteConfig.load(site.file), processes


@pytest.mark.parametrize("base", SETTINGS)
def test_its_file_loads_and_names_its_data(base: str, tmp_path: Path) -> None:
    site, config, processes = started(tmp_path, None, base)
    assert (processes.name, processes.command) == (
        "serve-clinic-a", [str(ENGINE_BIN / "umbel"), "serve", str(site.file)],
    )  # fmt: skip
    assert (config.training.data, config.training.eval_data) == (tmp_path / "train.jsonl", tmp_path / "eval.jsonl")
    setting = SETTINGS[base]
    assert (config.engine.port, config.model.served_name) == (site.port, setting.served_name)
    assert (config.engine.max_lora_rank, config.training.seq_len) == (setting.rank, setting.seq_len)
    assert (config.site.trusted_key, config.site.signing_key) == (None, None)


def test_with_keys_it_trusts_the_centres_and_signs_with_its_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_certs.make(keys, "localhost", ["clinic-a"], 1, 8443)
    _, config, _ = started(tmp_path, keys)
    own = keys / "site-clinic-a"
    assert (config.site.trusted_key, config.site.signing_key) == (own / "centre-signing.pub", own / "updates.key")
    assert own.joinpath("updates.key").is_file()


def test_a_real_base_is_served_and_trained_with_the_site_files_defaults(tmp_path: Path) -> None:
    _, config, _ = started(tmp_path, None, "real")
    assert (config.engine.dtype, config.engine.env) == ("bfloat16", {})


def test_while_it_does_not_answer_it_has_no_status_and_trains_nothing(tmp_path: Path) -> None:
    site = DemoSite("clinic-a", "clinic", tmp_path, None, SETTINGS["tiny"])
    assert site.status() == {}
    assert site.training() == {}
