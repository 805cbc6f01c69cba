"""A report holds every check, also one that raised; it has failed if one of them has."""

import asyncio
import json
import math

from scripts.tools.gpu_check.findings import Finding, Report


async def good() -> Finding:
    return Finding({"tokens": 3})


async def raises() -> Finding:
    raise ValueError("no such thing")


def test_a_check_that_raises_has_failed_and_the_next_one_runs() -> None:
    told: list[str] = []
    report = Report(told.append)
    asyncio.run(report.run("first", raises))
    asyncio.run(report.run("second", good))
    report.run_now("third", lambda: Finding(skipped="no GPU"))
    report.run_now("fourth", lambda: Finding({"wrong": 1}, failed="one token is another"))
    assert told == [
        "first: failed (ValueError: no such thing)", "second: passed", "third: skipped (no GPU)",
        "fourth: failed (one token is another)",
    ]  # fmt: skip
    assert report.failed == ["first", "fourth"]
    found = json.loads(report.json({"base": "tiny"}))
    assert (found["base"], found["passed"]) == ("tiny", False)
    assert [(check["name"], check["outcome"], check["reason"]) for check in found["checks"]] == [
        ("first", "failed", "ValueError: no such thing"), ("second", "passed", ""), ("third", "skipped", "no GPU"),
        ("fourth", "failed", "one token is another"),
    ]  # fmt: skip
    assert found["checks"][1]["figures"] == {"tokens": 3}


def test_what_json_has_no_number_for_is_null() -> None:
    report = Report(lambda text: None)
    report.run_now("one", lambda: Finding({"kept": {"value": 1.0, "low": math.nan, "high": math.inf}}))
    figures = json.loads(report.json({}))["checks"][0]["figures"]
    assert figures == {"kept": {"value": 1.0, "low": None, "high": None}}


def test_what_is_skipped_is_no_failure() -> None:
    report = Report(lambda text: None)
    report.run_now("one", lambda: Finding(skipped="no GPU"))
    assert json.loads(report.json({}))["passed"]
