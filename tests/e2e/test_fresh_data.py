"""A real site whose data changes under its users: new lines, released examples and forgotten ones; no restart."""

import json
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from client.data.user_examples import ExampleStore
from scripts.tools.trial_site import LENIENT, random_adapter, wait_until
from serving import tokenizer
from tests.toys.sites.site_process import SiteProcess
from tests.toys.sites.user_examples import example, scrub
from umbel.site.config import SiteConfig
from umbel.token_file import TokenFile

pytestmark = pytest.mark.e2e

LINES = 40
PRIVATE = "qzx7419"
"""A word that only one user's example has."""
EXTRA = """
eval_data = "rooms.jsonl"
[examples]
enabled = true
quarantine_hours = 0
"""
AT_A_TIME, PAUSE_S = 2, 0.5


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        site = SiteProcess(Path(folder), tiny_llama, extra=EXTRA + LENIENT)
        rooms = [{"prompt": f"bed {i}", "completion": f"room {i % 7}"} for i in range(20)]
        (site.folder / "rooms.jsonl").write_text("\n".join(map(json.dumps, rooms)))
        with site:
            yield site


class Users:
    """Stream answers all the time; whoever gets none, or not all of one, is counted."""

    def __init__(self, site: SiteProcess) -> None:
        self._site, self._over = site, threading.Event()
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self.answers: list[tuple[int, bool]] = []
        """Status of each answer, and whether it came to its end."""

    def __enter__(self) -> "Users":
        self._asking = [self._pool.submit(self._ask) for _ in range(AT_A_TIME)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for asking in self._asking:
            asking.result()

    def _ask(self) -> None:
        body = {"model": "support", "prompt": "ward 3", "max_tokens": 8, "stream": True}
        while not self._over.wait(PAUSE_S):
            with self._site.users.stream("POST", "/v1/completions", json=body) as reply:
                self.answers.append((reply.status_code, "[DONE]" in reply.read().decode()))


def trained(site: SiteProcess, number: int) -> dict[str, Any]:
    """Train a round; return its report."""
    reply = site.submit(f"r{number}", random_adapter(site.model, seed=9, b_std=0.0), number, steps=2)
    assert reply.status_code == 200, reply.text
    report = site.wait_round(f"r{number}")
    assert (report["state"], report["error"]) == ("done", "")
    return report


def written(site: SiteProcess) -> str:
    """Return the text of all token files that are on the disk."""
    words = tokenizer.load(site.model)
    files = (site.state_dir / "data").rglob("*.npy")
    return "\n".join(words.decode(ids) for file in files for ids in TokenFile.open(file).ids.tolist())


def test_new_lines_and_forgotten_users_reach_the_next_round_and_users_notice_nothing(site: SiteProcess) -> None:
    def data() -> dict[str, Any]:
        found: dict[str, Any] = site.status()["data"]["support"]
        return found

    def in_store(work: Callable[[ExampleStore], Any]) -> Any:
        with closing(ExampleStore.of(SiteConfig.load(site.file))) as store:
            return work(store)

    engine = site.engine_process().pid
    for user, text in (("eva", PRIVATE), ("ada", "the blue door")):
        in_store(lambda store, user=user, text=text: store.add(example(site.state_dir, user, text), scrub))  # type: ignore[misc]
    with Users(site) as users:
        assert trained(site, 1)["held_examples"] == LINES
        with (site.folder / "train.jsonl").open("a") as file:
            file.write('\n{"prompt": "the new ward", "completion": "room 40"}\n')
        assert in_store(ExampleStore.release) == [1, 2]
        wait_until(lambda: data()["train"] == LINES + 3, "the new lines")
        assert PRIVATE in written(site)
        assert trained(site, 2)["held_examples"] == LINES + 3
        update = site.control.get("/adapters/support/rounds/r2/update").content
        ref = site.deploy(2, update)

        assert in_store(lambda store: store.forget("eva")) == 1
        assert trained(site, 3)["held_examples"] == LINES + 2, "it waited for the data without her"
        assert (data()["refused"], data()["rounds_wait"]) == ("", False)
        assert PRIVATE not in written(site)
        assert "the blue door" in written(site)
        seen = len(users.answers)
        wait_until(lambda: len(users.answers) >= seen + 2 * AT_A_TIME, "answers after all that")
    assert set(users.answers) == {(200, True)}
    assert (site.live(), site.engine_process().pid, site.status()["engine"]["starts"]) == (str(ref), engine, 1)
    log = site.log.read_text()
    assert "data.refused" not in log
    assert PRIVATE not in log


def test_what_brings_nothing_more_is_not_trained_until_other_data_come(site: SiteProcess) -> None:
    def write(ask: str, answers: tuple[str, ...]) -> None:
        lot = random.Random(ask)
        with (site.folder / "train.jsonl").open("a") as file:
            for number in range(200):
                file.write(json.dumps({"prompt": f"{ask} {number}", "completion": lot.choice(answers)}) + "\n")

    def round_() -> dict[str, Any]:
        """Train a round from what the last one sent."""
        nonlocal parent, number
        number += 1
        reply = site.submit(f"w{number}", parent, number, steps=24, learning_rate=1e-2, seconds=600)
        assert reply.status_code == 200, reply.text
        report = site.wait_round(f"w{number}")
        if report["state"] == "done":
            parent = site.control.get(f"/adapters/support/rounds/w{number}/update").content
        return report

    before = site.status()["data"]["support"]["train"]
    write("bed", ("the north ward", "the south ward"))
    wait_until(lambda: site.status()["data"]["support"]["train"] >= before + 150, "the new lines")
    parent, number = random_adapter(site.model, seed=9, b_std=0.0), 10
    ends = [round_() for _ in range(9)]
    states = [end["state"] for end in ends]
    assert (states[0], states[-2:]) == ("done", ["skipped"] * 2), ends
    assert ends[-1]["error"].startswith("nothing worth training: ")
    assert (ends[-1]["steps"], ends[-1]["num_loss_tokens"], ends[-1]["update"]) == (0, 0, None)
    assert site.control.get(f"/adapters/support/rounds/w{number}/update").status_code == 409
    assert site.status()["worth"]["support"] == ends[-1]["error"]
    assert site.status()["rounds"]["skipped"] == states.count("skipped")
    write("order", ("blue paint", "red paint", "grey paint"))
    wait_until(lambda: site.status()["data"]["support"]["train"] >= before + 300, "the other lines")
    assert round_()["state"] == "done"
    left = {path.name for folder in (site.state_dir / "rounds" / "support").iterdir() for path in folder.iterdir()}
    assert left <= {"parent.safetensors", "update.safetensors"}, "what the bursts needed is gone"
    told = site.log.read_text()
    assert "paint" not in told
    assert "ward" not in told
