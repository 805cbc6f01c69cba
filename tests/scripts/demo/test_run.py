"""A run of the demo: its sites, and the prompts that its users take from the data."""

from pathlib import Path

import pytest

from scripts.tools.demo.run import Demo, prompt_of
from scripts.tools.processes import Processes


@pytest.mark.parametrize("secure", [False, True])
def test_sites_take_the_two_tasks_in_turn(tmp_path: Path, secure: bool) -> None:
    demo = Demo(tmp_path, 5, 1, Processes(tmp_path / "logs"), secure=secure)
    assert [site.name for site in demo.sites] == ["clinic-a", "shop-a", "clinic-b", "shop-b", "clinic-c"]
    assert [site.task for site in demo.sites] == ["clinic", "shop"] * 2 + ["clinic"]
    assert demo.write_data().keys() == {"clinic", "shop"}
    demo.make_keys()
    assert (tmp_path / "keys" / "site-clinic-c" / "updates.key").exists() == secure


def test_users_ask_the_prompts_of_either_format() -> None:
    assert prompt_of({"prompt": "a", "completion": "b"}) == "a"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_of({"messages": turns}) == "a"
