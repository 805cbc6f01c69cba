"""Three adapters that learn at one site, of two federations, and one that is only served: together in one engine."""

import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers

from scripts.tools.packed_base import reference
from scripts.tools.trial_site import LENIENT, RANK, random_adapter, wait_until
from tests.e2e.test_served_tokens import ask, next_ids, text_of
from tests.toys.sites.site_process import SiteProcess, first_in_each_python
from umbel import peft_dir
from umbel.adapter import AdapterRef

pytestmark = pytest.mark.e2e

LEARNING = ("support", "billing", "triage")
LINEAGE = {"support": "one", "billing": "two", "triage": "two"}
"""Adapter → the registry of its federation."""
SHARE = {"support": 1.0, "billing": 2.0}
ROUND_S = 30.0
AT_A_TIME, PAUSE_S = 3, 0.5
"""Users, and how long each thinks between an answer and the next question: training needs time to take many turns."""
KEY = "lineage-1-0123456789abcdef"
"""Two adapters of one registry have the same key in their first round."""
TABLES = """
[[adapter]]
name = "billing"
data = "billing.jsonl"
share = 2.0
[[adapter]]
name = "triage"
data = "triage.jsonl"
[[adapter.guard]]
name = "red-flags"
data = "flags.jsonl"
[[serve]]
name = "legal"
path = "legal"
"""
PROMPT = "ward 3"
Answers = dict[str, tuple[str, str]]
"""Name that users ask for → (the version that answers, its text)."""


DIES_IN_A_SWAP = """
import importlib.abc, importlib.util, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "serving.cotrainer.jobs.swap":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def executed(module):
            execute(module)
            advance = module.Swap.advance
            def dying(swap):
                advance(swap)
                if swap.next is not None and os.path.exists({file!r}):
                    os.unlink({file!r})
                    os.kill(os.getpid(), signal.SIGKILL)
            module.Swap.advance = dying
        spec.loader.exec_module = executed
        return spec
sys.meta_path.insert(0, Finder())
"""
"""Each Python of the site runs it first: the engine dies between two layers of a swap, once, if a file is there."""


@pytest.fixture(scope="module")
def die(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file at which the engine dies in its next swap."""
    folder = tmp_path_factory.mktemp("die")
    with first_in_each_python(folder, DIES_IN_A_SWAP.format(file=str(folder / "now"))):
        yield folder / "now"


@pytest.fixture(scope="module")
def site(tiny_llama: Path, die: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        site = SiteProcess(Path(folder), tiny_llama, extra=TABLES + LENIENT)
        for number, name in enumerate(("billing", "triage", "flags"), start=2):
            rows = [{"prompt": f"{name} {i}", "completion": f"{name} room {i * number % 13}"} for i in range(60)]
            (site.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        write_trained_elsewhere(site.folder / "legal", tiny_llama)
        with site:
            for seed, name in enumerate(LEARNING, start=1):
                site.deploy(1, random_adapter(tiny_llama, seed=seed), name=name, lineage=LINEAGE[name])
            yield site


def write_trained_elsewhere(folder: Path, model: Path) -> None:
    """Write the PEFT directory of an adapter with another rank, an alpha and only some layers, as its owner has it."""
    torch.manual_seed(4)
    base = reference(model, torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    made = peft.get_peft_model(base, config)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    made.save_pretrained(folder)


def answer(site: SiteProcess, model: str) -> tuple[str, str]:
    """Return the version that answers users of a name, and its greedy text."""
    reply = ask(site.users, "completions", model, PROMPT)
    return reply.headers["x-umbel-adapter"], text_of("completions", reply)


@pytest.mark.parametrize("name", [*LEARNING, "legal"])
def test_each_adapter_answers_as_peft_does_with_it(site: SiteProcess, name: str) -> None:
    folder = site.folder / "legal" if name == "legal" else site.state_dir / "adapters" / f"{name}-v1"
    version, text = answer(site, name)
    assert text == text_by_peft(site, folder)
    assert version.startswith(f"{name}@")
    assert answer(site, f"tiny:{name}") == (version, text), "SGLang's users write base:adapter"


def test_all_names_are_listed_with_their_parent(site: SiteProcess) -> None:
    cards = {card["id"]: card for card in site.users.get("/v1/models").json()["data"]}
    assert {name: cards[name]["parent"] for name in ("tiny", *LEARNING, "legal")} == {
        "tiny": None, **dict.fromkeys((*LEARNING, "legal"), "tiny"),
    }  # fmt: skip


class Users:
    """Ask for all names in turn, some at a time, until they are stopped; whoever is answered wrongly is kept."""

    def __init__(self, site: SiteProcess, expected: Callable[[str], set[tuple[str, str]]]) -> None:
        self._site, self._expected = site, expected
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self.asked = 0
        self.wrong: list[tuple[str, object]] = []

    def __enter__(self) -> "Users":
        names = itertools.cycle((*LEARNING, "legal", "tiny"))
        for _ in range(AT_A_TIME):
            self._pool.submit(self._ask, names)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()

    def _ask(self, names: Iterator[str]) -> None:
        while not self._over.is_set():
            time.sleep(PAUSE_S)
            name = next(names)
            self.asked += 1
            try:
                found = answer(self._site, name)
            except (AssertionError, OSError) as failed:
                self.wrong.append((name, failed))
                continue
            if found not in self._expected(name):
                self.wrong.append((name, found))


def test_two_adapters_train_in_turns_while_a_third_is_judged_and_promoted_and_users_notice_nothing(
    site: SiteProcess,
) -> None:
    parent = random_adapter(site.model, seed=9, b_std=0.0)
    before = {name: answer(site, name) for name in (*LEARNING, "legal", "tiny")}
    second = random_adapter(site.model, seed=21)
    later: Answers = {}
    with Users(site, lambda name: {before[name], *([later[name]] if name in later else [])}) as users:
        for name in SHARE:
            reply = site.submit(KEY, parent, adapter=name, steps=10**6, seconds=ROUND_S)
            assert reply.status_code == 200, reply.text
        wait_until(lambda: site.status()["training"]["parked_bytes"] > 0, "a turn of each round")
        ref = site.offer(2, second, name="triage", lineage=LINEAGE["triage"])
        running = site.status()
        assert running["running_rounds"].keys() == SHARE.keys(), "the verdict waited for no round"
        peft_dir.write(site.folder / "second", second, site.manifest(1, second), base=str(site.model))
        later["triage"] = (str(ref), text_by_peft(site, site.folder / "second"))
        assert site.promote(ref).status_code == 200
        reports = {name: site.wait_round(KEY, name) for name in SHARE}
    assert users.wrong == []
    assert users.asked >= 40
    assert answer(site, "triage") == later["triage"]
    assert {name: report["state"] for name, report in reports.items()} == dict.fromkeys(SHARE, "done")
    busy = {name: report["seconds"] * report["share"] for name, report in reports.items()}
    parts = {name: seconds / sum(busy.values()) for name, seconds in busy.items()}
    due = {name: share / sum(SHARE.values()) for name, share in SHARE.items()}
    assert parts == {name: pytest.approx(part, rel=0.1) for name, part in due.items()}, reports
    assert all(report["steps"] > 0 for report in reports.values())
    training = site.status()["training"]
    assert training["turns"] >= 4
    assert training["most_quanta_while_waiting"] <= 1
    assert (training["open_jobs"], training["parked_bytes"]) == ({}, 0)


def text_by_peft(site: SiteProcess, folder: Path) -> str:
    """Return the greedy answer of peft with the adapter in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(site.model)
    model = peft.PeftModel.from_pretrained(reference(site.model, torch.float32), folder)
    return str(tokenizer.decode(next_ids(model, tokenizer, PROMPT), skip_special_tokens=True))


def test_an_update_is_of_the_adapter_that_was_asked_for(site: SiteProcess) -> None:
    updates = {name: site.control.get(f"/adapters/{name}/rounds/{KEY}/update") for name in (*SHARE, "triage")}
    statuses = {name: reply.status_code for name, reply in updates.items()}
    assert statuses == {"support": 200, "billing": 200, "triage": 404}
    assert updates["support"].content != updates["billing"].content
    ranks = {a.shape[0] for a, _ in peft_dir.factors(peft_dir.decode(updates["billing"].content)).values()}
    assert ranks == {RANK}


def test_one_adapter_goes_back_and_the_others_stay(site: SiteProcess) -> None:
    live = {name: site.live(name) for name in LEARNING}
    assert site.control.post("/adapters/triage/rollback").json() == {"live": "triage@v1"}
    assert {name: site.live(name) for name in LEARNING} == {**live, "triage": "triage@v1"}
    assert answer(site, "triage")[0] == str(AdapterRef("triage", 1))


def test_an_engine_that_dies_in_the_middle_of_a_swap_costs_time_and_nothing_else(site: SiteProcess, die: Path) -> None:
    before = {name: answer(site, name) for name in (*LEARNING, "legal", "tiny")}
    parent = random_adapter(site.model, seed=10, b_std=0.0)
    die.touch()
    for name in SHARE:
        assert site.submit("again", parent, 2, adapter=name, steps=400, seconds=300).status_code == 200
    site.wait_ready(starts=2)
    assert not die.exists(), "it died of the swap"
    reports = {name: site.wait_round("again", name) for name in SHARE}
    assert [(report["state"], report["steps"]) for report in reports.values()] == [("done", 400), ("done", 400)]
    assert {name: answer(site, name) for name in before} == before
