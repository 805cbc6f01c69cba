"""Reading events.jsonl: each line once, also while it is written, cut short by a kill, or replaced."""

import json
from pathlib import Path

import pytest

from server.registry import events
from server.registry.events import EVENTS, EventReader, Events, EventTail


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds of the lines that were parsed."""
    parsed: list[int] = []
    real = json.loads

    def counted(line: bytes) -> object:
        event = real(line)
        parsed.append(event["round"])
        return event

    monkeypatch.setattr(events.json, "loads", counted)
    return parsed


def event(number: int, kind: str = "round.failed") -> str:
    return json.dumps({"event": kind, "at": float(number), "adapter": "support", "round": number, "reasons": {}})


def test_each_line_is_read_once_and_a_half_written_one_when_it_is_whole(tmp_path: Path, taken: list[int]) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    tail.catch_up()
    path.write_text(event(1) + "\n" + event(2) + "\n" + event(3)[:20])
    tail.catch_up()
    tail.catch_up()
    assert taken == [1, 2]
    with path.open("a") as file:
        file.write(event(3)[20:] + "\n")
    tail.catch_up()
    assert taken == [1, 2, 3]
    assert tail.last["support"].ended_at == 3.0
    assert tail.counts["round.failed"] == 3


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(event(1)[:20] + event(2) + "\n" + event(3) + "\n[1]\n")
    tail = EventTail(path)
    tail.catch_up()
    assert tail.counts == {"round.failed": 1}


@pytest.mark.parametrize("left", ["", event(1) + "\n", event(1) + "\n" + event(2)[:20], event(1)])
def test_an_event_is_a_line_of_its_own_whatever_was_left_before_it(tmp_path: Path, left: str) -> None:
    path = tmp_path / EVENTS
    path.write_text(left)
    events = Events(path, clock=lambda: 9.0)
    for kind in ("round.started", "round.failed"):
        events.emit(kind, adapter="support", round=3)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines[-2:]] == ["round.started", "round.failed"]
    assert lines[:-2] == left.splitlines()
    assert list(EventReader(path).read())[-2:] == [json.loads(line) for line in lines[-2:]]


def test_another_file_in_its_place_is_read_from_its_beginning(tmp_path: Path) -> None:
    path, other = tmp_path / "events.jsonl", tmp_path / "backup"
    path.write_text("".join(event(number) + "\n" for number in (1, 2, 3)))
    tail = EventTail(path)
    tail.catch_up()
    other.write_text("".join(event(number) + "\n" for number in (1, 2, 3, 4)))
    other.rename(path)
    tail.catch_up()
    assert tail.counts["round.failed"] == 4
    path.write_text(event(1) + "\n")
    tail.catch_up()
    assert tail.counts["round.failed"] == 1
    path.unlink()
    tail.catch_up()
    assert (tail.counts, tail.last) == ({}, {})


def test_a_reader_returns_only_what_was_added_and_says_when_the_file_is_another_one(tmp_path: Path) -> None:
    path, anew = tmp_path / EVENTS, []
    reader = EventReader(path, on_new_file=lambda: anew.append(True))
    assert list(reader.read()) == []
    events = Events(path, clock=lambda: 1.5)
    events.emit("round.started", adapter="support", round=1, parent=None)
    assert list(reader.read()) == [{"event": "round.started", "at": 1.5, "adapter": "support", "round": 1}]
    anew.clear()
    assert list(reader.read()) == []
    events.emit("round.failed", adapter="support", round=1)
    assert [event["event"] for event in reader.read()] == ["round.failed"]
    assert not anew
    path.unlink()
    assert list(reader.read()) == []
    assert anew


def test_lines_that_are_no_events_cost_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [
        '{"event": "round.started", "at": 1.0, "adapter": "support", "round": 1}',
        '{"event": "site.trained", "at": 2.0, "adapter": "support"}',
        '{"event": ["a"], "at": 3.0, "adapter": "support"}',
        '{"event": "round.started", "at": 4.0, "adapter": ["support"], "round": 2}',
        '{"event": "round.published", "at": "now", "adapter": "support", "weights": {}}',
        "[" * 100_000,
        '{"event": "round.published", "at": 5.0, "adapter": "support", "weights": {"a": 1.0}}',
    ]
    path.write_text("\n".join(lines) + "\n")
    tail = EventTail(path)
    tail.catch_up()
    assert tail.last["support"].number == 1
    assert tail.last["support"].admitted == 1
    assert sum(tail.counts.values()) == 3


def test_a_line_of_the_log_is_one_event_whatever_a_site_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events.log, "handlers", [])
    monkeypatch.setattr(events.log, "propagate", False)
    events.show_log()
    said = {"a\nround.promoted": "no\x1b[2K\r\nround.promoted"}
    Events(tmp_path / EVENTS).emit("round.failed", adapter="support", reasons=said, site="a\u00a0event=x", plain="b=c")
    events.log.warning("site %s left out: %s", "a\nb", "no\x1b[2K")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(r'adapter=support reasons={"a\nround.promoted": "no\u001b[2K\r\nround.promoted"} '
                          r'site="a\u00a0event=x" plain=b=c')  # fmt: skip
    assert second.endswith(r"site a\nb left out: no\u001b[2K")
    assert json.loads((tmp_path / EVENTS).read_text())["reasons"] == said
