"""The alias log: every move with its reason, sealed on the one before, whatever a kill left of it."""

from pathlib import Path

import pytest

from server.registry import views as registry_views
from tests.toys.registry import begun, flip, grow, v
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import AdapterError, NotFound, RegistryError

V1 = AdapterRef("support", 1)


def test_a_flipped_bit_in_the_alias_log_is_found_and_named(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    log = tmp_path / "support" / "aliases.jsonl"
    whole = log.read_bytes()
    for at in range(0, len(whole), 7):
        flip(log, at)
        assert any("aliases.jsonl, line" in damage for damage in registry_views.verify(registry)["damages"]), at
        log.write_bytes(whole)
    lines = whole.splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[2])
    with pytest.raises(RegistryError, match="line 2: not what was written there, or a line before it is gone"):
        registry.resolve("support@head")


def test_aliases_say_who_moved_them_when_and_why(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    assert registry.pointers("support") == {"head": v(0)}
    one, two, three, four = grow(registry, "aaro")
    assert registry.pointers("support") == {"head": two, "live": two, "previous": one, "shadow": four}
    assert registry.resolve("support@previous") == one
    registry.point("support", {"stable": one}, who="eva", why="the audit's")
    assert registry.roll_back("support", who="eva", why="worse answers") == one
    assert registry.pointers("support")["previous"] == two
    assert registry.aliases("support") == {"head": one, "live": one, "stable": one}
    assert registry.roll_back("support", who="eva", why="it was not the adapter") == two
    registry.point("support", {"stable": None}, who="eva", why="audit is over")
    assert [(move.to, move.who, move.why) for move in registry.moves("support")[-4:]] == [
        ({"stable": 1}, "eva", "the audit's"),
        ({"head": 1, "live": 1}, "eva", "worse answers"),
        ({"head": 2, "live": 2}, "eva", "it was not the adapter"),
        ({"stable": None}, "eva", "audit is over"),
    ]
    assert [ref.version for ref, _, _ in registry.history("support", "live")] == [1, 2, 1, 2]
    with pytest.raises(NotFound, match="support@stable"):
        registry.resolve("support@stable")
    assert three not in registry.pointers("support").values()


@pytest.mark.parametrize(
    ("alias", "to", "error"),
    [
        ("shadow", 0, RegistryError), ("previous", 0, RegistryError), ("head", None, RegistryError),
        ("v3", 0, AdapterError), ("Stable", 0, AdapterError), ("stable", 9, NotFound),
    ],
)  # fmt: skip
def test_an_alias_that_cannot_move_is_refused(
    tmp_path: Path, alias: str, to: int | None, error: type[Exception]
) -> None:
    registry = begun(tmp_path)
    with pytest.raises(error):
        registry.point("support", {alias: None if to is None else v(to)}, who="eva", why="x")
    assert len(registry.moves("support")) == 1


def test_nothing_is_pointed_at_a_version_whose_weights_are_gone(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    (registry.directory(V1) / peft_dir.WEIGHTS).resolve().unlink()
    with pytest.raises(RegistryError, match="is missing"):
        registry.roll_back("support", who="eva", why="x")
    assert registry.aliases("support")["live"] == v(2)


def test_a_line_cut_short_by_a_kill_is_a_move_only_when_it_is_whole_and_the_next_one_follows(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "a")
    path = tmp_path / "support" / "aliases.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in [*range(start, len(whole), 9), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:end])
        moved = end >= len(whole) - 1
        assert registry.aliases("support") == ({"head": V1, "live": V1} if moved else {"head": v(0)}), end
        registry.point("support", {"stable": v(0)}, who="eva", why="x")
        assert len(registry.moves("support")) == (3 if moved else 2), end
        assert path.read_bytes().endswith(b"}\n")
