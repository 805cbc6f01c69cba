"""`umbel bundle` and `umbel supernode`: refused by name before anything is copied or started."""

from pathlib import Path

from tests.toys.command_line import refusal
from umbel.site.template import site_toml


def test_bundle_wants_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "mine.txt").write_text("mine")
    assert refusal("bundle", tmp_path / "app") == f"{tmp_path / 'app'} is not empty; choose a new folder"
    assert [file.name for file in (tmp_path / "app").iterdir()] == ["mine.txt"]
    assert refusal("bundle", tmp_path / "app" / "mine.txt").endswith("mine.txt is a file; choose a new folder")


def test_a_supernode_without_a_site_file_is_told_which(tmp_path: Path) -> None:
    said = refusal("supernode", tmp_path / "site.toml", "--insecure")
    assert said.startswith(f"{tmp_path / 'site.toml'}: cannot be read")


def test_a_supernode_that_is_not_told_its_superlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(site_toml())
    said = refusal("supernode", tmp_path / "site.toml", "--insecure")
    assert said.startswith("no SuperLink is named, and Flower would join whatever listens on port 8000")
    assert "add --superlink HOST:PORT" in said
