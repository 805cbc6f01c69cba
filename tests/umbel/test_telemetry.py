"""Logging: text or JSON, one event per line, and quiet libraries."""

import json
import logging
from collections.abc import Iterator

import pytest

from umbel.telemetry import configure_logging


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("UMBEL_LOG", "UMBEL_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    root, ours = logging.getLogger(), logging.getLogger("umbel")
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(ours, "handlers", [])  # a test of the ServerApp's log may have run in this process before
    ours.setLevel(logging.NOTSET)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_event_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    logging.getLogger("umbel").info("round.start key=%s", "k")
    logging.getLogger("umbel").debug("too small")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" INFO round.start key=k")


def test_an_event_is_one_json_object_also_with_an_exception(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBEL_LOG", "json")
    configure_logging()
    try:
        raise ValueError("a line\nand another")
    except ValueError:
        logging.getLogger("umbel.site").exception("adapter.damaged ref=%s", "support@v1")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == (
        "ERROR",
        "umbel.site",
        "adapter.damaged ref=support@v1",
    )
    assert entry["exception"].endswith("ValueError: a line\nand another")


def test_the_level_is_the_operators_and_libraries_stay_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBEL_LOG_LEVEL", "DEBUG")
    configure_logging()
    logging.getLogger("umbel").debug("seen")
    logging.getLogger("httpx").info("HTTP Request: GET /hello")
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == ["seen"]


def test_what_others_wrote_stays_on_its_line_and_a_traceback_further_in(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    log = logging.getLogger("umbel")
    faked = "no\x1b[2K\r2026-01-01 00:00:00,000 INFO all is well\n2026-01-01 00:00:00,000 INFO adapter.promoted"
    log.warning("round.interrupted key=%s: %s", "k", faked)
    try:
        raise ValueError(faked)
    except ValueError:
        log.exception("failed")
    first, second, *traceback = capsys.readouterr().err.split("\n")[:-1]
    assert r": no\u001b[2K\r2026-01-01" in first
    assert first.endswith(r"INFO all is well\n2026-01-01 00:00:00,000 INFO adapter.promoted")
    assert second.endswith(" ERROR failed")
    assert len(traceback) > 3
    assert all(line.startswith("  ") for line in traceback)
    assert not any("\r" in line or "\x1b" in line for line in traceback)
