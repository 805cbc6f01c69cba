"""The run lock: one run at a time works on an adapter, and runs of other adapters do not wait for it."""

import fcntl
from pathlib import Path
from typing import IO

import pytest

from server.registry import views
from server.registry.run_lock import exclusive, folder, under_way
from tests.toys.registry import begun
from umbel.errors import AdapterError, RegistryError


def test_only_one_run_at_a_time_works_on_an_adapter(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    slept: list[float] = []
    waiting = exclusive(tmp_path, "support", 3, clock=lambda: sum(slept), sleep=slept.append)
    with exclusive(tmp_path, "support", 0), pytest.raises(RegistryError, match="another run works on support"):
        waiting.__enter__()
    assert sum(slept) == 3
    with exclusive(tmp_path, "support", 0), exclusive(tmp_path, "billing", 0):
        assert registry.names() == ["support"], "billing has no folder before its first quorum of sites"
    with exclusive(tmp_path, "support", 0):
        assert views.verify(registry) == {"versions": 1, "damages": []}, "locks are the registry's own files"


def test_a_name_that_is_a_path_locks_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        exclusive(tmp_path / "r", "../support", 0).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_who_looks_meets_no_run_in_another_one_who_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else `umbel fleet rollback` beside a monitoring `fleet ls` leaves the sites to a run that is not there."""
    with exclusive(tmp_path, "support", 0):
        pass
    (folder(tmp_path, "support") / "lock").chmod(0o400)
    real, inner = fcntl.flock, list[bool]()

    def flock(file: IO[str], operation: int) -> None:
        real(file, operation)
        if not inner:
            inner.append(True)
            inner.append(under_way(tmp_path, "support"))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert (under_way(tmp_path, "support"), inner) == (False, [True, False])
    monkeypatch.undo()
    with exclusive(tmp_path, "support", 0):
        assert under_way(tmp_path, "support")
    assert not under_way(tmp_path, "billing")
