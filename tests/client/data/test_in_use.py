"""Token files stay as long as a round or a probe uses them, and no longer."""

import json
from pathlib import Path

from client.data.in_use import DataInUse
from client.data.prepare import Prepared


def written(folder: Path, name: str) -> Prepared:
    """Write token files that nobody reads, in a directory with the name of a digest."""
    folder = folder / (name * 64)
    folder.mkdir()
    (folder / "train.npy").write_text(json.dumps(name))
    return Prepared(folder / "train.npy", folder / "eval.npy", 10, 5, 50)


def test_what_begins_uses_the_newest_and_what_is_under_way_keeps_its_own(tmp_path: Path) -> None:
    first, second, third = (written(tmp_path, name) for name in "abc")
    data = DataInUse(first)
    with data.held() as of_a_round:
        data.adopt(second)
        with data.held() as of_a_probe:
            data.adopt(third)
            assert (of_a_round, of_a_probe, data.current) == (first, second, third)
            assert {one.name for one in tmp_path.iterdir()} == {"a" * 64, "b" * 64, "c" * 64}
        assert {one.name for one in tmp_path.iterdir()} == {"a" * 64, "c" * 64}
    assert {one.name for one in tmp_path.iterdir()} == {"c" * 64}


def test_what_two_hold_goes_with_the_second_of_them(tmp_path: Path) -> None:
    first, second = (written(tmp_path, name) for name in "ab")
    data = DataInUse(first)
    with data.held():
        with data.held():
            data.adopt(second)
        assert first.train.exists()
    assert not first.folder.exists()


def test_a_preparation_keeps_all_that_is_there_and_finds_what_comes_back(tmp_path: Path) -> None:
    first, second = (written(tmp_path, name) for name in "ab")
    data = DataInUse(first)
    with data.held():
        data.adopt(second)
        preparing = data.all_held()
        names = preparing.__enter__()
        assert set(names) == {"a" * 64, "b" * 64}
    assert first.train.exists(), "the preparation may find it again"
    data.adopt(first)
    preparing.__exit__(None, None, None)
    assert (data.current, first.train.exists(), second.folder.exists()) == (first, True, False)


def test_the_same_again_changes_nothing_and_a_folder_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    first = written(tmp_path, "a")
    data = DataInUse(first)
    data.adopt(first)
    assert first.train.exists()
    other = Prepared(tmp_path / "train.npy", tmp_path / "eval.npy", 1, 1, 1)
    data.adopt(other)
    data.adopt(written(tmp_path, "b"))
    assert tmp_path.is_dir()
    assert not first.folder.exists()


def test_what_is_dropped_is_removed_unless_it_is_in_use(tmp_path: Path) -> None:
    first, second = (written(tmp_path, name) for name in "ab")
    data = DataInUse(first)
    for one in (first, second):
        data.drop(one)
    assert (first.train.exists(), second.folder.exists(), data.current) == (True, False, first)
