"""An adapter that was trained elsewhere becomes v1: it is read whole or refused, and the next run goes on from it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.registry import diff, lineage, run_lock, views
from server.registry.peft import export as adapter_export
from server.registry.peft.importing import take_in
from server.registry.registry import IMPORTED, AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.command_line import refusal, umbel
from tests.toys.federation import World, a_world, states
from tests.toys.peft_adapter import ALPHA, MODULES, RANK, base, factors, peft
from tests.toys.registry import begun, v
from tests.toys.site import SHAPES
from umbel import peft_child, peft_dir
from umbel.adapter import AdapterManifest
from umbel.base.fingerprint import BaseFingerprint
from umbel.errors import AdapterError, ConfigError, Conflict, RegistryError
from umbel.faults import VARIABLE, Point


def imported(registry: AdapterRegistry, folder: Path, **changes: object) -> AdapterManifest:
    """Import the toy adapter, which is written where it is not there."""
    if not (folder / "base").exists():
        base(folder / "base")
        peft(folder / "legal")
    wanted: dict = {
        "base": folder / "base", "target_modules": MODULES, "dtype": "bfloat16", "who": "eva", "why": "our own",
        **changes,
    }  # fmt: skip
    return take_in(registry, "support", folder / "legal", **wanted)


def test_what_was_trained_elsewhere_is_v1_and_every_command_knows_it(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "r", create=True)
    version = imported(registry, tmp_path)
    assert (str(version.ref), version.round, version.rank, version.strategy) == ("support@v1", 0, RANK, IMPORTED)
    assert (version.options["directory"], len(str(version.options["sha256"]))) == ("legal", 64)
    pin = registry.pin("support")
    assert pin is not None
    assert (pin.shapes, pin.rank, pin.dtype, pin.kin) == (SHAPES, RANK, "bfloat16", "")
    assert pin.fingerprint == BaseFingerprint.of(tmp_path / "base")
    blob, _ = registry.read(v(1))
    for name, array in factors().items():
        scaling = ALPHA / RANK if ".lora_B." in name else 1
        np.testing.assert_array_equal(peft_dir.decode(blob)[name], scaling * array)

    def is_whole(registry: AdapterRegistry) -> None:
        assert registry.aliases("support") == dict.fromkeys(("head", "live"), v(1))
        assert [(move.who, move.why) for move in registry.moves("support")][1:] == [("eva", "our own")]
        assert views.verify(registry) == {"versions": 2, "damages": []}
        text = lineage.text(lineage.graph(registry, "support"))
        assert text.splitlines() == ["support@v0", "support@v1  imported  [head]  [live]"]
        assert diff.compare(registry.read(v(0)), registry.read(v(1))).fields["strategy"] == ("init", IMPORTED)

    is_whole(registry)
    registry.close()
    (tmp_path / "r" / "registry.sqlite").unlink()
    registry = AdapterRegistry(tmp_path / "r")
    assert registry.lost == []
    is_whole(registry)
    card = (adapter_export.export(registry, v(1), tmp_path / "out") / adapter_export.CARD).read_text()
    assert "trained elsewhere and imported, made by umbel" in card
    assert "directory legal" in card
    assert registry.roll_back("support", who="eva", why="worse") == v(0), "the untrained one: the base answers"


def test_both_versions_are_signed_where_the_centre_signs(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    registry = AdapterRegistry(tmp_path / "r", create=True, key=key)
    imported(registry, tmp_path)
    assert views.verify(registry, key=key.public_key()) == {"versions": 2, "damages": [], "unsigned": []}


def test_what_an_adapter_lacks_is_filled_so_that_it_changes_nothing_and_can_be_trained(tmp_path: Path) -> None:
    """The sites adapt o_proj, too; without a random A there a gradient would be zero for ever."""
    registry = AdapterRegistry(tmp_path / "r", create=True)
    imported(registry, tmp_path, target_modules=("v_proj", "o_proj", "q_proj"))
    pairs = peft_dir.factors(peft_dir.decode(registry.read(v(1))[0]))
    a, b = pairs["model.layers.0.self_attn.o_proj"]
    assert len(pairs) == 3
    assert np.count_nonzero(a) == a.size == RANK * 6
    assert not b.any()


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"target_modules": ("q_proj", "v_proj", "lm_head")}, ConfigError, "lm_head cannot be adapted"),
        ({"target_modules": ()}, ConfigError, "nothing cannot be adapted"),
        ({"target_modules": ("gate_proj", "up_proj")}, AdapterError, "is adapted"),
        ({"base": Path("/nowhere")}, ConfigError, "no base model here"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_no_trace(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], why: str
) -> None:
    registry = AdapterRegistry(tmp_path / "r", create=True)
    with pytest.raises(error, match=why):
        imported(registry, tmp_path, **changes)
    assert registry.names() == []
    assert registry.pin("support") is None


def test_settings_that_never_end_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_child, "LOOK_S", 3.0)
    base(tmp_path / "base")
    peft(tmp_path / "legal", alpha_pattern={"((([a-z0-9_.]+)+)+)+!": 1})
    registry = AdapterRegistry(tmp_path / "r", create=True)
    with pytest.raises(AdapterError, match="legal: not read within 3 s; is a pattern of its settings one that never"):
        imported(registry, tmp_path)
    assert registry.names() == []


def test_an_adapter_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "r", create=True)
    with run_lock.exclusive(tmp_path / "r", "support", 0), pytest.raises(RegistryError, match="another run works on"):
        imported(registry, tmp_path)
    imported(registry, tmp_path)
    with pytest.raises(Conflict, match=r"support is in .* already; choose another name"):
        imported(registry, tmp_path)
    other = begun(tmp_path / "other")
    other.rounds.record("support", 1, "r", RoundState.TRAINING)
    with pytest.raises(Conflict, match=r"support is in .* already"):
        imported(other, tmp_path)
    assert len(other.versions("support")) == 1


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


def test_the_next_run_brings_it_to_the_sites_and_trains_on(world: World, tmp_path: Path) -> None:
    version = imported(AdapterRegistry(world.root, create=True), tmp_path)
    for site in world.sites.values():
        site.base = BaseFingerprint.of(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"rank = 4, but support in .* has rank 2; run with rank=2"):
        world.start(rounds=1, rank=4)
    registry = world.start(rounds=1)
    brought = world.told("fleet.reconciled")[0]
    assert (brought["live"], brought["brought"]) == ("support@v1", {"a": "base", "b": "base"})
    assert states(registry) == [RoundState.PROMOTED]
    assert world.live == {"a": "support@v2", "b": "support@v2", "c": None}
    assert registry.manifest(v(2)).parent == version.digest
    assert peft_dir.digest(world.sites["a"].parent(1)) == version.digest


def test_a_site_that_finds_it_worse_keeps_the_base_and_trains_all_the_same(world: World, tmp_path: Path) -> None:
    imported(AdapterRegistry(world.root, create=True), tmp_path)
    for site in world.sites.values():
        site.base = BaseFingerprint.of(tmp_path / "base")
    world.sites["b"].accepts = False
    world.start(rounds=0)
    assert world.told("fleet.reconciled")[0]["kept"].keys() == {"b"}
    assert world.live == {"a": "support@v1", "b": None, "c": None}


POINTS = [Point.BEGIN_PINNED, Point.BLOB_WRITTEN, Point.VERSION_RENAMED, Point.VERSION_LISTED, Point.ALIASES_MOVED]


@pytest.mark.parametrize("die_at", [*POINTS, *(f"{point}:2" for point in POINTS[1:4])])
def test_an_import_that_a_kill_cut_short_is_finished_by_the_next_one(tmp_path: Path, die_at: str) -> None:
    root = tmp_path / "r"
    AdapterRegistry(root, create=True).close()
    command = [
        "adapter", "import", "support", peft(tmp_path / "legal"), "--base", base(tmp_path / "base"),
        "--target-modules", "q_proj,v_proj", "--registry", root, "--why", "our own",
    ]  # fmt: skip
    program = [sys.executable, "-m", "umbel.cli", *map(str, command)]
    killed = subprocess.run(program, env={**os.environ, VARIABLE: die_at}, check=False)
    assert killed.returncode == -signal.SIGKILL, f"{die_at} was never reached"
    ended = umbel(*command)
    assert (ended.returncode, ended.stdout) == (
        0, 'support@v1 is head and live; run with adapter="support" and rank=2\n'
    ), ended.stderr  # fmt: skip
    registry = AdapterRegistry(root)
    assert views.verify(registry) == {"versions": 2, "damages": []}
    assert registry.aliases("support") == dict.fromkeys(("head", "live"), v(1))
    assert len(registry.moves("support")) == 2
    assert "support is in" in refusal(*command)
