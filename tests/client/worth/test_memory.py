"""What a site remembers is its owner's only, and damage is told and costs a round, not the site."""

from pathlib import Path

import numpy as np
import pytest

from client.worth import memory
from client.worth.memory import CONTENT, FILE, DomainMemory, Memory

KNOWN = Memory(looks=3, domains={"a": DomainMemory(trials=1, reached={2**64 - 1: 0.5})}, parent="p", data="d")


def test_it_is_found_again_by_the_next_daemon(tmp_path: Path) -> None:
    folder = tmp_path / "worth" / "support"
    assert memory.read(folder)[0] == Memory()
    memory.write(folder, KNOWN, np.array([7, 2**64 - 1, 7], np.uint64))
    found, content = memory.read(folder)
    assert (found, content.tolist()) == (KNOWN, [7, 2**64 - 1])
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("file", [FILE, CONTENT])
@pytest.mark.parametrize("damage", [b"", b"junk", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_damage_is_told_and_nothing_is_known_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: bytes
) -> None:
    memory.write(tmp_path, KNOWN, np.array([7], np.uint64))
    (tmp_path / file).write_bytes(damage)
    found, content = memory.read(tmp_path)
    assert (found, len(content)) == (Memory(), 0)
    assert "worth.forgotten" in caplog.text
