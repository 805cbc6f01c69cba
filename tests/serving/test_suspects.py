"""Which requests are refused after an engine's death: the only suspect, or one of two deaths, for an hour."""

from pathlib import Path

import pytest

from serving import suspects as suspects_module
from serving.suspects import FILE, REFUSED_S, Refusals, Suspects

A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))
NOW = 1_700_000_000.0


def refused(suspects: Suspects, now: float = NOW) -> set[bytes]:
    return {bytes.fromhex(one) for one in suspects.refusals(now).until}


def test_the_only_request_in_flight_is_refused_for_an_hour() -> None:
    suspects = Suspects()
    assert suspects.engine_died([A], (), NOW) == [A]
    assert suspects.refusals(NOW).until == {A.hex(): NOW + REFUSED_S}
    assert refused(suspects, NOW + REFUSED_S - 1) == {A}
    assert refused(suspects, NOW + REFUSED_S) == set()


def test_of_several_in_flight_one_is_refused_when_it_was_there_twice() -> None:
    suspects = Suspects()
    assert suspects.engine_died([A, B], (), NOW) == []
    assert suspects.engine_died([B, C], (), NOW + 10) == [B]
    assert refused(suspects) == {B}


def test_a_suspicion_is_forgotten_after_an_hour() -> None:
    suspects = Suspects()
    suspects.engine_died([A, B], (), NOW)
    assert suspects.engine_died([A, C], (), NOW + REFUSED_S) == []


def test_a_request_that_was_answered_before_is_not_suspected() -> None:
    """As a monitor's, which asks the same again and again and is in flight at every death."""
    suspects = Suspects()
    assert suspects.engine_died([A], {A}, NOW) == []
    assert suspects.engine_died([A, B], {A}, NOW) == [B], "so the other one was alone"


def test_the_same_request_sent_twice_at_once_is_one_suspect() -> None:
    assert Suspects().engine_died([A, A], (), NOW) == [A]


def test_of_more_than_are_remembered_the_oldest_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects_module, "MOST", 2)
    suspects = Suspects()
    for number, one in enumerate((A, B, C)):
        suspects.engine_died([one], (), NOW + number)
    assert refused(suspects) == {B, C}


def test_what_is_written_is_read_and_digests_need_its_key(tmp_path: Path) -> None:
    assert Refusals.read(tmp_path) is None
    suspects = Suspects()
    suspects.write(tmp_path, NOW)
    first = Refusals.read(tmp_path)
    assert first is not None
    one = first.digest("/v1/completions", b"{}")
    assert one == first.digest("/v1/completions", b"{}")
    assert len({one, first.digest("/v1/messages", b"{}"), first.digest("/v1/completions", b"{ }")}) == 3
    suspects.engine_died([one], (), NOW)
    suspects.write(tmp_path, NOW)
    again = Refusals.read(tmp_path)
    assert again == Refusals(key=first.key, until={one.hex(): NOW + REFUSED_S})
    assert Suspects().refusals(NOW).digest("/v1/completions", b"{}") != one, "another run has another key"
    assert "completions" not in (tmp_path / FILE).read_text()
