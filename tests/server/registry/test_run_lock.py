"""The run lock: one run at a time works on a registry."""

from pathlib import Path

import pytest

from server.registry.registry import AdapterRegistry
from tests.toys.registry import begun
from umbel.errors import RegistryError


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    registry, other = begun(tmp_path), AdapterRegistry(tmp_path)
    slept: list[float] = []
    waiting = other.exclusive(3, clock=lambda: sum(slept), sleep=slept.append)
    with registry.exclusive(0), pytest.raises(RegistryError, match="another run"):
        waiting.__enter__()
    assert sum(slept) == 3
    with other.exclusive(0):
        pass
