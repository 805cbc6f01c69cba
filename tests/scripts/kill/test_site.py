"""The user of the kill matrix, and the site's death as it is told: silences, and deaths that were none."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tools.kill.site import Site, User
from scripts.tools.processes import ProcessError, Processes


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> User:
    """A user who asks nothing; the answers are made up."""
    monkeypatch.setattr(User, "_keep_asking", lambda self: None)
    made = User("http://nobody")
    made._answers += [(10.0, "base"), (12.0, "support@v1"), (19.0, "support@v2")]
    return made


def test_answers_are_those_that_began_since(user: User) -> None:
    assert user.answered_since(12.0) == [(12.0, "support@v1"), (19.0, "support@v2")]
    assert user.answered_since(20.0) == []


def test_the_longest_silence_counts_from_the_beginning_to_the_end(user: User) -> None:
    assert user.longest_silence(9.0, 20.0) == 7.0
    assert user.longest_silence(9.0, 30.0) == 11.0, "after the last answer"
    assert user.longest_silence(0.0, 11.0) == 10.0, "before the first one"
    assert user.longest_silence(13.0, 14.0) == 1.0, "no answer at all"


@pytest.mark.parametrize(
    ("code", "told"),
    [("import os; os.kill(os.getpid(), 9)", None), ("raise SystemExit(3)", "the site ended by itself")],
)
def test_only_sigkill_is_a_death(
    code: str, told: str | None, user: User, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path / "site", tiny_llama, Processes(tmp_path / "logs"))
    assert not site.dead()
    monkeypatch.setattr(site, "_process", subprocess.Popen([sys.executable, "-c", code]))
    if told is None:
        site.wait_dead()
    else:
        with pytest.raises(ProcessError, match=told):
            site.wait_dead()
    assert site.dead()
    with pytest.raises(ProcessError, match="the site ended while it was starting; see"):
        site.wait_ready()


def test_it_is_settled_when_nothing_waits(
    user: User, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path / "site", tiny_llama, Processes(tmp_path / "logs"))
    for states, rounds, settled in ((["live", "judged"], [], True), (["probing"], [], False), (["live"], ["r"], False)):
        versions = {f"support@v{number}": {"state": state} for number, state in enumerate(states)}
        monkeypatch.setattr(site, "status", lambda v=versions, r=rounds: {"versions": v, "open_rounds": r})
        assert site.settled() is settled
