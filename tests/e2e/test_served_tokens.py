"""A site serves the tokens that transformers + peft compute: every family, base and adapter, on every route."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import transformers

from scripts.tools.gpu_check.parity import PROMPTS
from scripts.tools.packed_base import reference
from scripts.tools.trial_site import random_adapter
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

TOKENS = 64
ROUTES = ("completions", "chat", "responses", "messages")
IGNORES_EOS = ("completions", "chat")
"""Routes whose body may ask to go on after the end of a sequence; the others stop there."""


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def site(request: pytest.FixtureRequest) -> Iterator[SiteProcess]:
    model: Path = request.getfixturevalue(request.param)
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, SiteProcess(Path(folder), model) as site:
        site.deploy(1, random_adapter(model, seed=1))
        yield site


@pytest.mark.parametrize("asked", ["tiny", "support"])
def test_greedy_tokens_equal_the_reference(site: SiteProcess, asked: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(site.model)
    model = reference(site.model, torch.float32)
    adapter = site.folder / "state" / "adapters" / "support-v1"
    if asked == "support":
        model = peft.PeftModel.from_pretrained(model, adapter)
    for prompt in PROMPTS:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        expected = {text: next_ids(model, tokenizer, text) for text in (prompt, chat)}
        for route in ROUTES:
            for stream in (False, True) if prompt in PROMPTS[:2] else (False,):
                reply = ask(site.users, route, asked, prompt, stream=stream)
                assert reply.headers["x-umbel-adapter"] == ("support@v1" if asked == "support" else "base")
                ids = expected[prompt if route == "completions" else chat]
                if route not in IGNORES_EOS and tokenizer.eos_token_id in ids:
                    ids = ids[: ids.index(tokenizer.eos_token_id)]
                wanted = tokenizer.decode(ids, skip_special_tokens=True)
                assert text_of(route, reply, stream) == wanted, (route, stream, prompt)


def test_an_adapter_changes_the_answer(site: SiteProcess) -> None:
    answers = {
        model: text_of("completions", ask(site.users, "completions", model, PROMPTS[0]))
        for model in ("tiny", "support")
    }
    assert answers["tiny"] != answers["support"]


def next_ids(model: Any, tokenizer: Any, text: str, tokens: int = TOKENS) -> list[int]:
    """Return the next ids, so many, greedily; an end of sequence ends nothing."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    generated: list[int] = out[0, ids.shape[1] :].tolist()
    assert len(generated) == tokens
    return generated


def ask(users: httpx.Client, route: str, model: str, prompt: str, stream: bool = False) -> httpx.Response:
    messages = [{"role": "user", "content": prompt}]
    path, body = {
        "completions": ("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS}),
        "chat": ("/v1/chat/completions", {"messages": messages, "max_tokens": TOKENS}),
        "responses": ("/v1/responses", {"input": prompt, "max_output_tokens": TOKENS}),
        "messages": ("/v1/messages", {"messages": messages, "max_tokens": TOKENS}),
    }[route]
    body |= {"ignore_eos": True} if route in IGNORES_EOS else {}
    reply = users.post(path, json={"model": model, "temperature": 0, "stream": stream, **body})
    assert reply.status_code == 200, reply.text
    return reply


def text_of(route: str, reply: httpx.Response, stream: bool = False) -> str:
    if stream:
        lines = [line.removeprefix("data:").strip() for line in reply.text.splitlines() if line.startswith("data:")]
        return "".join(_delta(route, json.loads(line)) for line in lines if line != "[DONE]")
    body = reply.json()
    if route == "completions":
        return str(body["choices"][0]["text"])
    if route == "chat":
        return str(body["choices"][0]["message"]["content"])
    if route == "responses":
        return "".join(part["text"] for item in body["output"] for part in item["content"])
    return "".join(part["text"] for part in body["content"])


def _delta(route: str, event: dict[str, Any]) -> str:
    if route == "completions":
        return "".join(choice["text"] for choice in event["choices"])
    if route == "chat":
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if route == "responses":
        return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""
    return str(event["delta"].get("text", "")) if event["type"] == "content_block_delta" else ""
