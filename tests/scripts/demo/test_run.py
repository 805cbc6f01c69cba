"""A run of the demo: its sites, and the prompts that its users take from the data."""

import json
from pathlib import Path

import pytest

from scripts.tools.demo.run import Demo, prompt_of
from scripts.tools.demo.settings import SETTINGS
from scripts.tools.processes import Processes
from serving.scores import effective_size
from umbel.site.sections import ShadowSection


@pytest.mark.parametrize("secure", [False, True])
def test_sites_take_the_two_tasks_in_turn(tmp_path: Path, secure: bool) -> None:
    demo = Demo(tmp_path, 5, 1, Processes(tmp_path / "logs"), secure=secure)
    assert [site.name for site in demo.sites] == ["clinic-a", "shop-a", "clinic-b", "shop-b", "clinic-c"]
    assert [site.task for site in demo.sites] == ["clinic", "shop"] * 2 + ["clinic"]
    assert demo.write_data().keys() == {"clinic", "shop"}
    demo.make_keys()
    assert (tmp_path / "keys" / "site-clinic-c" / "updates.key").exists() == secure


def test_only_a_real_base_is_asked_before_and_after(tmp_path: Path) -> None:
    assert {name: setting.asked > 0 for name, setting in SETTINGS.items()} == {"tiny": False, "real": True}
    demo = Demo(tmp_path, 2, 1, Processes(tmp_path / "logs"), secure=False)
    assert demo.ask_before_and_after(demo.write_data()) == {}


def test_the_real_bases_sites_have_facts_of_their_own_and_enough_held_out_to_tell_a_difference(tmp_path: Path) -> None:
    demo = Demo(tmp_path, 2, 1, Processes(tmp_path / "logs"), secure=False, setting=SETTINGS["real"])
    files = demo.write_data()
    assert files.keys() == {"clinic", "shop"}
    for _, heldout in files.values():
        lines = [json.loads(line) for line in heldout.read_text().splitlines()]
        lengths = [len(line["messages"][-1]["content"]) for line in lines]
        assert effective_size(lengths) >= ShadowSection.model_fields["min_examples"].default


def test_users_ask_the_prompts_of_either_format() -> None:
    assert prompt_of({"prompt": "a", "completion": "b"}) == "a"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_of({"messages": turns}) == "a"
