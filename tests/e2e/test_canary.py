"""A real site that watches a shadow with its users' own traffic, and takes back by itself what they rate down."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.tools.trial_site import random_adapter
from serving.priorities import CLASSES
from tests.toys.sites.site_process import SiteProcess
from umbel.adapter import AdapterRef

pytestmark = pytest.mark.e2e

SHADOW = """
[shadow]
max_loss_ratio = 1.5
min_examples = 2
max_latency_ratio = 50
watch_s = 600
canary_share = 0.4
mirror_share = 1.0
min_requests = 80
rollback_window_s = 600
control_share = 0.4
min_users = 3
"""
USERS = [f"user-{number}" for number in range(24)]
PATIENCE_S = 300
V1, V2 = AdapterRef("support", 1), AdapterRef("support", 2)


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with (
        tempfile.TemporaryDirectory(prefix="umbel-") as folder,
        SiteProcess(Path(folder), tiny_llama, extra=SHADOW) as site,
    ):
        yield site


def ask(site: SiteProcess, user: str, **fields: Any) -> tuple[str, str]:
    """One greedy answer: its id and the version that gave it."""
    messages = [{"role": "system", "content": "You know every ward."}, {"role": "user", "content": "Return a list of"}]
    body = {"model": "support", "messages": messages, "user": user, "temperature": 0, "max_tokens": 8}
    body |= {"ignore_eos": True, "skip_special_tokens": False}  # the tiny base would rather say nothing
    body |= fields
    reply = site.users.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"], reply.headers["x-umbel-adapter"]


def rate(site: SiteProcess, answer: str, rating: str) -> str:
    reply = site.users.post("/v1/feedback", json={"id": answer, "rating": rating})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["umbel_adapter"])


def report(site: SiteProcess, ref: AdapterRef) -> dict[str, Any]:
    found: dict[str, Any] = site.control.get(f"/adapters/{ref}/shadow").json()
    return found


def watched(site: SiteProcess, ref: AdapterRef) -> None:
    """Push a version that says what the base says, and wait until it is watched."""
    blob = random_adapter(site.model, seed=ref.version, b_std=0.0)
    assert site.push(site.manifest(ref.version, blob), blob).status_code == 200
    deadline = time.monotonic() + PATIENCE_S
    while (found := report(site, ref))["state"] != "watching":
        assert found["state"] in ("candidate", "probing"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    while not site.status()["aliases"]["support"]["shadow"]:
        time.sleep(0.1)


def judged(site: SiteProcess, ref: AdapterRef) -> dict[str, Any]:
    """Users come until a watched version is judged."""
    while (found := report(site, ref))["state"] == "watching":
        for user in USERS:
            ask(site, user)
    return found


def rated(site: SiteProcess) -> dict[str, str]:
    """Every user asks once, and likes all versions but the second; return who was answered by which."""
    answered = {}
    for user in USERS:
        answer, label = ask(site, user)
        answered[user] = rate(site, answer, "down" if label == "support@v2" else "up")
    return answered


def traffic(site: SiteProcess, kind: str, label: str) -> dict[str, Any]:
    found: dict[str, Any] = site.status()["traffic"][kind][label]
    return found


def test_the_canary_is_the_same_users_and_a_shadow_equal_to_live_agrees_with_it(site: SiteProcess) -> None:
    for named in CLASSES:  # which SGLang is not told to go by
        assert {ask(site, user, priority=named)[1] for user in USERS} == {"base"}
    watched(site, V1)
    first, second = ([ask(site, user) for user in USERS] for _ in range(2))
    labels = [label for _, label in first]
    assert labels == [label for _, label in second], "a user meets one version"
    assert set(labels) == {"base", "support@v1"}
    for answer, label in first:
        assert rate(site, answer, "up") == label
    assert rate(site, first[0][0], "down") == labels[0]
    assert site.users.post("/v1/feedback", json={"id": "no such answer", "rating": "up"}).status_code == 404
    found = judged(site, V1)
    assert found["verdict"]["decision"] == "promote", found
    assert any(reason.startswith("mirror: 100.0% of the leading words") for reason in found["verdict"]["reasons"])
    mirror = traffic(site, "mirror", "support@v1")
    assert mirror["compared"] > 0
    assert (mirror["agreement"], mirror["failed"], mirror["empty"]) == (mirror["compared"], 0, 0)
    assert mirror["words"] == mirror["live_words"] > 0
    shadow = traffic(site, "versions", "support@v1")
    assert (shadow["errors"], shadow["users"]) == (0, labels.count("support@v1"))
    assert "by_user" not in shadow
    assert shadow["up"] + shadow["down"] == labels.count("support@v1")
    assert {ask(site, user)[1] for user in USERS} == {"base"}, "the canary is over"


def test_a_version_that_users_rate_down_is_taken_back_by_the_site(site: SiteProcess) -> None:
    assert site.control.post(f"/adapters/{V1}/promote").json()["state"] == "live"
    assert "adapter.prefilled ref=support@v1 prefixes=1" in site.log.read_text()
    answered = {user: ask(site, user)[1] for user in USERS}
    assert set(answered.values()) == {"base", "support@v1"}, "some users stay with what answered before"
    watched(site, V2)
    assert judged(site, V2)["verdict"]["decision"] == "promote"
    assert site.control.post(f"/adapters/{V2}/promote").json()["state"] == "live"
    control = {user for user, label in answered.items() if label == "base"}
    deadline = time.monotonic() + PATIENCE_S
    while "support@v2" in (answered := rated(site)).values():
        assert {user for user, label in answered.items() if label == "support@v1"} >= control
        assert time.monotonic() < deadline, site.log.read_text()[-3000:]
    assert set(answered.values()) == {"support@v1"}
    status = site.status()
    assert status["aliases"]["support"] == {"live": "support@v1", "previous": "support@v2", "shadow": None}
    taken_back = status["versions"]["support@v2"]["taken_back"]
    assert taken_back.startswith("worse than support@v1, bad ratings: ")
    assert any(event == f"rolled back by itself: {taken_back}" for _, event, _ in status["history"]["support"])
    for secret in ("Return a list", "every ward", USERS[0]):
        assert secret not in site.log.read_text(), "nothing of what users say, or who they are, is logged"
