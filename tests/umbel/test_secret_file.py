"""Files that hold a secret: read only if nobody else can, and never shown."""

from pathlib import Path

import pytest

from umbel import secret_file
from umbel.errors import ConfigError


def secret(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_a_secret_is_read_as_it_is(tmp_path: Path) -> None:
    assert secret_file.read(secret(tmp_path / "token", "abc\n"), "the token") == "abc\n"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"others can read the token; chmod 600 {tmp_path}/token$"):
        secret_file.read(secret(tmp_path / "token", "abc", mode), "the token")


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: the token cannot be read"):
        secret_file.read(tmp_path / "none", "the token")
    with pytest.raises(ConfigError, match="not text; the token has letters and digits only"):
        secret_file.read(secret(tmp_path / "token", b"\xff\xfe"), "the token")


def test_keys_are_one_per_line_between_comments(tmp_path: Path) -> None:
    keys = ("first-key-of-eva-0", "second-key-of-max-1")
    file = secret(tmp_path / "keys", f"# eva\n{keys[0]}\n\n  {keys[1]}  \n")
    assert secret_file.read_keys(file) == keys


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no API key"),
        ("short", "line 1: shorter than 16"),
        ("# x\ntwo words of a key", "line 2: not an API key"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        secret_file.read_keys(secret(tmp_path / "keys", content))
    assert "two words" not in str(refusal.value)


def test_a_new_file_is_its_owners_only(tmp_path: Path) -> None:
    with open(tmp_path / "new", "xb", opener=secret_file.opener) as file:
        file.write(b"secret")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
