"""Four scripted adapters on a real site, four verdicts: better, equal, worse, and good on average but broken on a task.

All of them are trained by a site itself. The poisoned one comes from a stay with other data, as from a hostile
federation: it has learnt the rooms longer than the live one, and the triage wrongly.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.tools.trial_site import RANK, random_adapter
from tests.toys.sites.site_process import SiteProcess
from umbel import peft_dir

pytestmark = pytest.mark.e2e

URGENCY, WRONG = ("now", "today", "later"), ("send them home",)


def rooms(numbers: range) -> list[dict[str, str]]:
    return [{"prompt": f"ward {i}", "completion": f"room {i % 7}"} for i in numbers]


def triage(numbers: range, answers: tuple[str, ...] = URGENCY) -> list[dict[str, str]]:
    return [{"prompt": f"patient {i}", "completion": answers[i % len(answers)]} for i in numbers]


POLICY = """
eval_data = "rooms.jsonl"
[shadow]
[[shadow.guard]]
name = "triage"
data = "triage.jsonl"
"""


ASKED = {"rooms.jsonl": rooms(range(60)), "triage.jsonl": triage(range(60))}
"""The site's own files of held-out examples and of its guard."""


def own(site: SiteProcess) -> None:
    """Give the site its own files: it asks them, and trains on something else."""
    for name, examples in ASKED.items():
        write(site.folder / name, examples)
    write(site.folder / "train.jsonl", [{"prompt": f"shelf {i}", "completion": f"row {i % 5}"} for i in range(40)])


def write(file: Path, examples: list[dict[str, str]]) -> None:
    file.write_text("\n".join(map(json.dumps, examples)))


@pytest.fixture
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        site = SiteProcess(Path(folder), tiny_llama, extra=POLICY)
        own(site)
        yield site


def trained(site: SiteProcess, examples: list[dict[str, str]], steps: int) -> bytes:
    """Train an adapter that changes nothing at this site, elsewhere, where nobody asks what it trains on."""
    write(site.folder / "train.jsonl", examples)
    for name in ASKED:
        write(site.folder / name, [{"prompt": f"elsewhere {name}", "completion": "yes"}])
    with site:
        key = f"steps-{steps}"
        site.submit(key, random_adapter(site.model, seed=1, b_std=0.0), steps=steps, seconds=400, learning_rate=3e-3)
        report = site.wait_round(key)
        assert (report["state"], report["error"], report["steps"]) == ("done", "", steps)
        found = site.control.get(f"/adapters/support/rounds/{key}/update").content
    own(site)
    return found


def verdict(site: SiteProcess, version: int, blob: bytes) -> dict[str, Any]:
    manifest = site.manifest(version, blob)
    assert site.push(manifest, blob).status_code == 200
    found: dict[str, Any] = site.wait_judged(manifest.ref)["verdict"]
    print(version, found)
    return found


def worse_than(blob: bytes) -> bytes:
    """An update that does the opposite."""
    tensors = peft_dir.decode(blob)
    return peft_dir.encode({name: -array if ".lora_B." in name else array for name, array in tensors.items()})


def test_four_adapters_get_four_verdicts_for_the_right_reasons(site: SiteProcess) -> None:
    better = trained(site, rooms(range(60)) + triage(range(60)), steps=30)
    poisoned = trained(site, rooms(range(60)) + triage(range(60), WRONG), steps=70)
    assert {array.shape[0] for name, array in peft_dir.decode(better).items() if ".lora_A." in name} == {RANK}
    with site:
        first = verdict(site, 1, better)
        assert (first["decision"], first["accepted"]) == ("promote", True)
        assert "held-out loss" in first["reasons"][0]
        assert "lower" in first["reasons"][0]
        assert site.control.post("/adapters/support@v1/promote").status_code == 200

        equal = verdict(site, 2, better)
        assert (equal["decision"], equal["accepted"]) == ("keep", False)
        assert "no clear difference" in equal["reasons"][0]

        worse = verdict(site, 3, worse_than(better))
        assert worse["decision"] == "reject"
        assert any(reason.startswith("held-out loss") and "higher" in reason for reason in worse["reasons"])

        harmful = verdict(site, 4, poisoned)
        assert harmful["decision"] == "reject"
        assert harmful["reasons"][0].startswith("guard triage")
        assert any(reason.startswith("held-out loss") and "lower" in reason for reason in harmful["reasons"])

        reply = site.users.post("/v1/completions", json={"model": "support", "prompt": "ward 3", "max_tokens": 1})
        assert reply.headers["x-umbel-adapter"] == "support@v1", "users are answered by the one that is better"
    assert np.isfinite([array.sum() for array in peft_dir.decode(poisoned).values()]).all()
