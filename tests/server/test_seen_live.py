"""The versions that sites were last seen to serve."""

from types import SimpleNamespace
from typing import Any

from server.seen_live import SeenLive


def test_a_site_is_known_until_it_may_have_changed() -> None:
    nodes = {"a": 1, "b": 2, "c": 3}
    roster: Any = SimpleNamespace(node_of=nodes.get)
    seen = SeenLive(roster)
    seen.note(nodes, "support@v1")
    seen.note({"c", "away"}, None)
    assert seen.at("support@v1") == {"a", "b"}
    assert seen.at(None) == {"c"}, "a site that is not online is not known"
    nodes["a"] = 4
    assert seen.at("support@v1") == {"b"}, "another SuperNode speaks for it now"
    seen.forget({"b", "never seen"})
    assert seen.at("support@v1") == set()
    seen.forget_all()
    assert seen.at(None) == set()
