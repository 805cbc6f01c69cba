"""Hostile site files: each is refused with lines that begin with the file's name, and nothing is created."""

import os
import re
from pathlib import Path

import pytest

from tests.toys.hostile.catalogue import Hostile
from tests.toys.hostile.sites import FILES
from umbel import errors
from umbel.site.check import check_files
from umbel.site.config import SiteConfig

GOOD = """[site]
name = "clinic-a"
state_dir = "state"
[model]
path = "base"
[[adapter]]
name = "support"
[training]
data = "train.jsonl"
[engine]
port = 30000
"""


@pytest.mark.parametrize("one", FILES, ids=lambda one: one.what)
def test_a_hostile_site_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: Hostile) -> None:
    for name in os.environ:
        if name.upper().startswith("UMBEL_SITE__"):
            monkeypatch.delenv(name)
    file = tmp_path / "site.toml"
    content = one.make(GOOD)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(getattr(errors, one.answer)) as error:
        check_files(SiteConfig.load(file))
    said = str(error.value)
    assert re.search(one.says, said, re.DOTALL), said
    assert len(said) < 2000
    assert [entry.name for entry in tmp_path.iterdir()] == ["site.toml"], "checking makes nothing"
    file.write_text(GOOD)
    assert SiteConfig.load(file).site.name == "clinic-a"
