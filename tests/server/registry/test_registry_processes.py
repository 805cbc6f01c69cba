"""Several processes at one registry, some killed in the middle: no version that was reported is lost."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.registry import UNTRAINED, begun, blob, publish, publisher
from umbel.adapter import AdapterRef

pytestmark = pytest.mark.slow


def whole(root: Path) -> AdapterRegistry:
    """Open the registry and read back every listed version."""
    registry = AdapterRegistry(root)
    for manifest in registry.versions("support"):
        content, read = registry.read(manifest.ref)
        assert registry.verify(manifest.ref) == []
        assert content == blob(manifest.round or UNTRAINED)
        assert read == manifest
        assert manifest.round == 0 or registry.rounds.find("support", manifest.round).version == manifest.version
    assert registry.resolve("support@head") in [manifest.ref for manifest in registry.versions("support")]
    return registry


def test_two_publishers_lose_nothing(tmp_path: Path) -> None:
    begun(tmp_path).close()
    publishers = [publisher(tmp_path, first, 25) for first in (1, 101)]
    said = [line for process in publishers for line in process.communicate()[0].splitlines() if "@" in line]
    assert [process.returncode for process in publishers] == [0, 0]
    registry = whole(tmp_path)
    assert sorted(said) == sorted(str(AdapterRef("support", version)) for version in range(1, 51))
    assert sorted(manifest.round for manifest in registry.versions("support")) == [0, *range(1, 26), *range(101, 126)]
    assert len(registry.moves("support")) == 51, "every accepted round moved head and live once"


@pytest.mark.parametrize("seed", range(2))
def test_kill_in_the_middle_of_fifty_publishes_leaves_every_listed_version_loadable(tmp_path: Path, seed: int) -> None:
    begun(tmp_path).close()
    pick = random.Random(seed)
    said: set[str] = set()
    first, kills = 1, 0
    while len(said) < 50:
        process = publisher(tmp_path, first, 50)
        assert process.stdout is not None
        for _ in range(pick.randint(1, 20)):
            said.add(process.stdout.readline().strip())
        time.sleep(pick.random() * 0.01)  # to be killed anywhere within a publish
        os.kill(process.pid, signal.SIGKILL)
        said |= {line for line in process.communicate()[0].splitlines() if "@" in line}
        registry = whole(tmp_path)
        listed = {str(manifest.ref) for manifest in registry.versions("support")}
        assert said <= listed
        kills += 1
        assert len(listed - said - {"support@v0"}) <= kills, "a kill leaves at most one version that nobody was told of"
        first = max(manifest.round for manifest in registry.versions("support")) + 1
        registry.close()


def test_killed_before_every_single_step_of_a_publish_the_next_one_goes_on(tmp_path: Path) -> None:
    """Kill before each step in turn, until a process outlives its last step."""
    for step in range(1, 100):
        root = tmp_path / str(step)
        begun(root).close()
        process = publisher(root, 1, 1, die_before=step)
        said = process.communicate()[0].splitlines()
        registry = whole(root)
        versions = len(registry.versions("support"))
        assert versions == 2 or not said, f"killed before step {step}, after it was announced"
        if versions == 2:
            registry.accept("support", 1, "r", {})  # as a federation does that goes on
            assert registry.rounds.find("support", 1).state is RoundState.PROMOTED
            assert registry.aliases("support") == dict.fromkeys(("head", "live"), AdapterRef("support", 1))
        registry.close()
        (root / "registry.sqlite").unlink()
        assert len(whole(root).versions("support")) == versions
        assert publish(AdapterRegistry(root), 2) == AdapterRef("support", versions)
        if process.returncode == 0:
            assert said[-1] == f"calls {step - 1}"
            break
    assert step > 8, "blob, three small files, their directory, the rename, and the alias are steps of their own"


def test_one_registry_is_made_by_two_processes_at_once(tmp_path: Path) -> None:
    """Both processes find no index and build it; each version is listed once."""
    begun(tmp_path).close()
    (tmp_path / "registry.sqlite").unlink()
    publishers = [publisher(tmp_path, first, 3) for first in (1, 101)]
    for process in publishers:
        process.communicate()
        assert process.returncode == 0
    assert len(whole(tmp_path).versions("support")) == 7
