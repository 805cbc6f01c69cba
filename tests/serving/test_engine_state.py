"""The file that engines write in place: its counters and tables, as another process reads them, also after a death."""

import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from serving import engine_state
from serving.engine_state import ANSWERED, DIGEST_BYTES, FILE, IN_FLIGHT, EngineState


def digest(number: int) -> bytes:
    return (number + 1).to_bytes(DIGEST_BYTES, "big")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


def test_an_engine_without_a_daemon_has_no_state(tmp_path: Path) -> None:
    assert engine_state.opened(tmp_path) is None


def test_the_file_takes_its_whole_room_at_once(path: Path) -> None:
    EngineState.create(path)
    assert path.stat().st_blocks * 512 >= path.stat().st_size > DIGEST_BYTES * (IN_FLIGHT + ANSWERED)


def test_counters_are_seen_by_who_opened_the_file_before(path: Path) -> None:
    daemon = EngineState.create(path)
    scheduler, http = EngineState(path), EngineState(path)
    for _ in range(3):
        scheduler.count_batch()
    http.count_output()
    assert (daemon.batches, daemon.outputs) == (3, 1)


def test_a_request_is_in_flight_from_its_beginning_to_its_end(path: Path) -> None:
    daemon = EngineState.create(path)
    http = EngineState(path)
    first, second, twice = (http.begin(one) for one in (digest(1), digest(2), digest(1)))
    assert sorted(daemon.in_flight()) == [digest(1), digest(1), digest(2)]
    http.end(first, answered=True)
    http.end(second, answered=False)
    assert (daemon.in_flight(), daemon.answered()) == ([digest(1)], {digest(1)})
    http.end(twice, answered=True)
    assert (daemon.in_flight(), daemon.answered()) == ([], {digest(1)})


def test_more_requests_than_there_is_room_for_are_answered_without_a_note(path: Path) -> None:
    state = EngineState.create(path)
    slots = [state.begin(digest(number)) for number in range(IN_FLIGHT + 2)]
    assert slots[IN_FLIGHT:] == [None, None]
    assert len(state.in_flight()) == IN_FLIGHT
    state.end(slots[-1], answered=True)
    state.end(slots[0], answered=True)
    assert state.begin(digest(9)) == slots[0]


def test_the_oldest_answered_request_makes_way_and_an_engine_goes_on_where_the_last_one_ended(path: Path) -> None:
    state = EngineState.create(path)
    for number in range(ANSWERED):
        state.end(state.begin(digest(number)), answered=True)
    nxt = EngineState(path)
    for number in (ANSWERED - 1, ANSWERED, ANSWERED + 1):
        nxt.end(nxt.begin(digest(number)), answered=True)
    assert nxt.answered() == state.answered() == {digest(number) for number in range(2, ANSWERED + 2)}


def _take_and_die(path: Path) -> None:
    state = EngineState(path)
    state.begin(digest(7))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_was_answering_is_read_and_cleared(path: Path) -> None:
    daemon = EngineState.create(path)
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert daemon.in_flight() == [digest(7)]
    daemon.clear_in_flight()
    assert EngineState(path).in_flight() == []


def test_only_its_owner_reads_it_under_the_daemons_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        EngineState.create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
