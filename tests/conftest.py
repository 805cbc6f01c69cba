"""What several test files share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's path has at most 107 bytes, and pytest's own folders are deep."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        yield Path(folder)
