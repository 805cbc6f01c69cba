"""The demo with two adapters: each site has a part of two tasks, and what would break the demo's promises is told."""

import copy
from pathlib import Path
from typing import Any

import pytest

from scripts.tools.demo.adapters import TASK_OF, TwoAdapters, broken_promises
from scripts.tools.demo.events import ENDS
from scripts.tools.processes import Processes
from umbel.site.config import SiteConfig


class Recorded(Processes):
    """Processes that are not started: the site answers at once."""

    def start(self, name: str, command: list[str], **environment: str) -> None: ...  # type: ignore[override]

    def wait_for(self, *_: object) -> None: ...


def test_every_site_has_both_adapters_each_with_a_part_of_its_own_task(tmp_path: Path) -> None:
    demo = TwoAdapters(tmp_path, 3, 1, Recorded(tmp_path / "logs"), secure=False)
    data = demo.write_data()
    parts = [demo.part(index, data) for index in range(3)]
    for adapter, task in TASK_OF.items():
        lines = [part[adapter][0].read_text().splitlines() for part in parts]
        assert sorted(line for own in lines for line in own) == sorted(data[task][0].read_text().splitlines())
        assert min(map(len, lines)) > 100
    demo.start_two(demo.sites[1], tmp_path / "base", parts[1])
    config = SiteConfig.load(demo.sites[1].file)
    assert config.adapters == ("support", "billing")
    assert [(one.data, one.eval_data) for one in config.adapter] == [parts[1]["support"], parts[1]["billing"]]
    assert parts[0]["support"] != parts[1]["support"] != parts[1]["billing"]


def test_a_line_says_which_adapter_it_is_about(tmp_path: Path) -> None:
    demo = TwoAdapters(tmp_path, 2, 1, Recorded(tmp_path / "logs"), secure=False)
    ended = {"event": "round.promoted", "adapter": "billing", "round": 2, "version": 3, "sites": ["a"]}
    assert "billing  [bold]round 2: v3 answers users at a" in demo.told_of(ended)


def users(model: str, **answers: int) -> dict[str, Any]:
    return {"requests": 9, "failed": 0, "failures": [], "model": model, "answers_by_version": answers}


SUMMARY: dict[str, Any] = {
    "users": {
        "a, support": users("support", **{"base": 4, "support@v1": 5}),
        "a, billing": users("billing", **{"billing@v2": 9}),
        "a, tiny": users("tiny", base=9),
    },
    "rounds": [
        {"adapter": adapter, "end": ENDS["round.promoted"], "reasons": {}} for adapter in ("support", "billing")
    ],
    "sites": {site: {"live": {"support": "support@v1", "billing": "billing@v2"}} for site in ("a", "b")},
}


def test_a_demo_that_keeps_its_promises_breaks_none() -> None:
    assert broken_promises(SUMMARY, rounds=1) == []


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("users", "a, billing", "failed"), 2, "a, billing: 2 of 9 requests failed: no"),
        (("users", "a, support", "answers_by_version"), {"billing@v2": 1}, "a, support: billing@v2 answered, another"),
        (("users", "a, tiny", "answers_by_version"), {"support@v1": 1}, "a, tiny: support@v1 answered, another"),
        (("sites", "b", "live", "billing"), None, "billing: the sites do not serve one promoted version: None"),
        (("sites", "b", "live", "support"), "support@v2", "support: the sites do not serve one promoted version"),
        (("rounds", 1, "end"), "failed", "billing: only 0 of 1 rounds were promoted"),
    ],
)
def test_every_broken_promise_is_told(where: tuple[Any, ...], value: object, told: str) -> None:
    summary = copy.deepcopy(SUMMARY)
    summary["users"]["a, billing"]["failures"] = ["no"]
    *path, last = where
    place = summary
    for key in path:
        place = place[key]
    place[last] = value
    (line,) = broken_promises(summary, rounds=1)
    assert line.startswith(told)
