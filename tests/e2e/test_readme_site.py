"""The README's own site file on a CPU: bfloat16, no variable set. It serves, trains, promotes and goes back.

bfloat16 keeps 8 bits of a number, so two implementations may choose differently where two tokens are almost equally
likely. The reference reads what the engine wrote, and must have chosen the same wherever its own choice is clear.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers

from scripts.tools.gpu_check.greedy_tokens import compare
from scripts.tools.trial_site import random_adapter
from serving.engine import PASSIVE_WAITING
from tests.toys import readme
from tests.toys.sites.site_process import SiteProcess
from umbel import peft_dir

pytestmark = pytest.mark.e2e

BF16 = ml_dtypes.bfloat16
TOKENS = 48
PROMPTS = ("Return the number of", "import os", "The quick brown fox", "class Reader:", "a list of strings and", "one")
CLEAR = 0.125
"""Lead of the reference's choice, in logits, over which the engine must choose the same: eight times the distance of
bfloat16 numbers between 2 and 4."""
COMPARED = 0.5
"""Least share of all positions at which the reference's choice must be clear."""
THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
"""Beginnings of the variables that say how many threads there are and how they wait."""


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    text = readme.site_file()
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(THREADS)]:
            patch.delenv(name)
        site = SiteProcess(Path(folder), tiny_llama)
        for theirs, ours in (("/models/Llama-3.1-8B-Instruct", str(tiny_llama)), ("30000", str(site.port))):
            assert text.count(theirs) == 1
            text = text.replace(theirs, ours)
        site.file.write_text(text)
        examples = [{"prompt": f"ward {i}", "completion": f"room {i * 7 % 13}"} for i in range(320)]
        (site.folder / "private").mkdir()
        (site.folder / "private" / "train.jsonl").write_text("\n".join(map(json.dumps, examples)))
        with site:
            site.deploy(1, random_adapter(tiny_llama, seed=1, dtype=BF16))
            yield site


def test_the_engine_waits_passively_with_all_cores(site: SiteProcess) -> None:
    environment = site.engine_process().environ()
    assert {name: value for name, value in environment.items() if name.startswith(THREADS)} == PASSIVE_WAITING


def test_it_serves_and_trains_in_bfloat16(site: SiteProcess) -> None:
    assert site.control.get("/hello", params={"adapter": "support"}).json()["dtype"] == "bfloat16"
    training = site.status()["training"]
    assert training["shared_tensors"] == training["frozen_tensors"] > 0, "it trains on what it serves"


@pytest.mark.parametrize("asked", ["llama", "support"])
def test_greedy_tokens_equal_the_reference_where_its_choice_is_clear(site: SiteProcess, asked: str) -> None:
    version = "base" if asked == "llama" else "support@v1"
    answers = ask(site, asked, version)
    clear, wrong = compare(reference(site, version), answers, CLEAR)
    assert wrong == []
    assert clear >= COMPARED * len(PROMPTS) * TOKENS
    clear, wrong = compare(reference(site, "support@v1" if asked == "llama" else "base"), answers, CLEAR)
    assert len(wrong) > clear / 2, "another version chooses other tokens"


def test_a_round_is_trained_promoted_and_taken_back(site: SiteProcess) -> None:
    parent = random_adapter(site.model, seed=7, b_std=0.0, dtype=BF16)
    losses = []
    for number, key in enumerate(("first", "second"), start=1):
        assert site.submit(key, parent, number, steps=20, learning_rate=2e-3).status_code == 200
        report = site.wait_round(key)
        assert (report["state"], report["steps"]) == ("done", 20), report
        losses.append(report["loss_sum"] / report["num_loss_tokens"])
        parent = site.control.get(f"/adapters/support/rounds/{key}/update").content
        assert peft_dir.digest(parent) == report["update"]
    assert losses[1] < losses[0]
    tensors = peft_dir.decode(parent)
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}, "nothing is rounded on the way"
    assert all(np.any(array) for array in tensors.values()), "every module has moved"

    site.deploy(2, parent)
    clear, wrong = compare(reference(site, "support@v2"), ask(site, "support", "support@v2"), CLEAR)
    assert wrong == []
    assert clear >= COMPARED * len(PROMPTS) * TOKENS
    assert site.roll_back().json() == {"live": "support@v1"}
    assert compare(reference(site, "support@v1"), ask(site, "support", "support@v1"), CLEAR)[1] == []


def ask(site: SiteProcess, model: str, version: str) -> list[tuple[list[int], list[int]]]:
    """Have users ask every prompt, and check who answers; return the ids of prompts and answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(site.model)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        body = {"model": model, "prompt": ids, "max_tokens": TOKENS, "temperature": 0}
        reply = site.users.post("/v1/completions", json={**body, "ignore_eos": True, "return_token_ids": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-umbel-adapter"] == version
        answers.append((ids, reply.json()["choices"][0]["token_ids"]))
        assert len(answers[-1][1]) == TOKENS
    return answers


def reference(site: SiteProcess, version: str) -> Any:
    """The same version in `transformers` and `peft`, in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(site.model, dtype=torch.bfloat16)
    if version == "base":
        return model
    adapter = site.folder / "state" / "adapters" / version.replace("@", "-")
    return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
