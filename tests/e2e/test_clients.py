"""A real site, asked by OpenAI's and Anthropic's own clients: their ordinary calls are answered, class by class."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
import transformers
from pydantic import BaseModel

from serving.priorities import CLASSES, Priority
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

ASK: Any = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "ward 3"}]
FUNCTION: Any = {
    "name": "find",
    "description": "Find a room.",
    "parameters": {
        "type": "object",
        "properties": {"ward": {"enum": ["3", "5"]}},
        "required": ["ward"],
        "additionalProperties": False,
    },
}
SENT_ANYWAY: Any = {
    "metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto", "store": False,
    "user": "u",
}  # fmt: skip


TO_THE_END: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
"""The tiny base would end most answers at once."""


class Room(BaseModel):
    ward: Literal["3", "5"]


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    """A site whose engine goes by the classes of requests, and answers one at a time."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("UMBEL_SITE__ENGINE__EXTRA_ARGS__ENABLE_PRIORITY_SCHEDULING", "true")
        environment.setenv("UMBEL_SITE__ENGINE__EXTRA_ARGS__MAX_RUNNING_REQUESTS", "1")
        # The order of answers is seen here: a LONG stream of single tokens could end here after a short one behind it.
        environment.setenv("UMBEL_SITE__ENGINE__EXTRA_ARGS__STREAM_INTERVAL", "100")
        with SiteProcess(Path(folder), tiny_llama) as site:
            yield site


@pytest.fixture(scope="module")
def no_blanks(tiny_llama: Path) -> dict[str, int]:
    """A bias against the end, and against blanks, of which JSON may have any number: the tiny base would write both."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    blanks = {token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()}
    return dict.fromkeys(map(str, sorted(blanks | set(tokenizer.all_special_ids))), -100)


@pytest.fixture
def client(site: SiteProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def claude(site: SiteProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=site.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 4, **fields})


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][:2] == ["tiny", "support"]


def test_a_chat_and_its_second_turn(client: openai.OpenAI) -> None:
    first = chat(client, **SENT_ANYWAY)
    assert first.choices[0].message.role == "assistant"
    second = chat(client, messages=[*ASK, first.choices[0].message, {"role": "user", "content": "and ward 5?"}])
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_stream_with_its_usage(client: openai.OpenAI) -> None:
    whole = chat(client, **TO_THE_END).choices[0].message.content
    chunks = list(chat(client, **TO_THE_END, stream=True, stream_options={"include_usage": True}))
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole
    assert chunks[-1].usage.completion_tokens == 4


def test_parts_of_a_message(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "ward 3"}]
    assert (
        chat(client, messages=[ASK[0], {"role": "user", "content": parts}]).usage.prompt_tokens
        == chat(client).usage.prompt_tokens
    )


def test_several_answers(client: openai.OpenAI) -> None:
    assert len(chat(client, n=3, temperature=1).choices) == 3


def test_log_probabilities(client: openai.OpenAI) -> None:
    content = chat(client, **TO_THE_END, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in content] == [2] * 4


def test_a_seed_and_the_other_numbers(client: openai.OpenAI) -> None:
    drawn = {"seed": 2**40, "temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1}
    assert chat(client, **drawn, logit_bias={"7": -100}, max_completion_tokens=4).usage.completion_tokens


def test_a_stop(client: openai.OpenAI, no_blanks: dict[str, int]) -> None:
    asked: Any = {"logit_bias": no_blanks, "temperature": 0, "max_tokens": 12}
    whole = chat(client, **asked).choices[0].message.content
    within = whole[len(whole) // 2]
    cut = chat(client, **asked, stop=[within]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(within)], "stop")


def test_an_answer_by_a_schema(client: openai.OpenAI, no_blanks: dict[str, int]) -> None:
    parsed = client.chat.completions.parse(
        model="tiny", messages=ASK, response_format=Room, max_tokens=100, temperature=0, logit_bias=no_blanks
    )
    message = parsed.choices[0].message
    assert message.parsed is not None
    assert message.parsed.ward in ("3", "5")
    free = chat(client, response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content
    assert free.strip().startswith("{")


def test_tools_that_may_and_that_must_be_called(client: openai.OpenAI, no_blanks: dict[str, int]) -> None:
    tools: Any = [{"type": "function", "function": FUNCTION}]
    certain: Any = {"tools": tools, "max_tokens": 100, "temperature": 0, "logit_bias": no_blanks}
    assert chat(client, tools=tools, parallel_tool_calls=False).choices[0].message
    for choice in ("required", {"type": "function", "function": {"name": "find"}}):
        answer = chat(client, **certain, tool_choice=choice, parallel_tool_calls=False).choices[0].message
        assert "find" in str(answer.tool_calls or answer.content)
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"ward": "3"}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "room 7"}]
    assert chat(client, messages=[*ASK, *turns], tools=tools).usage.prompt_tokens > 0


def test_plain_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt=["ward 3", "ward 5"], n=2, max_tokens=4, logprobs=2)
    assert len(made.choices) == 4
    assert client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, echo=True).choices[0].text
    chunks = list(client.completions.create(model="tiny", prompt="ward 3", max_tokens=4, stream=True, user="u"))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_responses_and_their_second_turn(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "max_output_tokens": 16, "temperature": 0}
    first = client.responses.create(**asked, instructions="Answer.", input="ward 3", **SENT_ANYWAY)
    assert (first.status, first.metadata, first.user) == ("completed", {"a": "b"}, "u")
    text = [{"type": "output_text", "text": "room 7", "annotations": []}]
    said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": text}
    turns: Any = [{"role": "user", "content": "ward 3"}, said, {"role": "user", "content": "and ward 5?"}]
    assert client.responses.create(**asked, input=turns).usage.input_tokens > first.usage.input_tokens
    assert client.responses.create(**asked, input=[*turns[:1], *first.output, turns[-1]]).status
    events = list(client.responses.create(**asked, input="ward 3", stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    tool: Any = {"type": "function", **FUNCTION, "strict": True}
    assert client.responses.create(**asked, input="ward 3", tools=[tool]).status
    schema = {"type": "json_schema", "name": "room", "schema": {"enum": ["3", "5"]}, "strict": True}
    assert client.responses.create(**asked, input="ward 3", text={"format": schema}).output_text in ('"3"', '"5"')


def test_messages_whole_and_as_a_stream(claude: anthropic.Anthropic) -> None:
    cached: Any = [{"type": "text", "text": "Answer.", "cache_control": {"type": "ephemeral"}}]
    asked: Any = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "ward 3"}]}
    tool: Any = {"name": "find", "description": "Find a room.", "input_schema": FUNCTION["parameters"]}
    made = claude.messages.create(**asked, system=cached, metadata={"user_id": "u"}, stop_sequences=["~~"])
    assert (made.type, made.role) == ("message", "assistant")
    assert made.stop_reason in ("end_turn", "max_tokens")
    assert claude.messages.create(**asked, tools=[tool], tool_choice={"type": "auto"}).usage.input_tokens > 0
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 20}
    with claude.messages.stream(**asked, extra_body=drawn) as stream:
        assert stream.get_final_message().usage.output_tokens > 0


def test_a_refusal_reaches_the_client_as_its_own_kind_of_error(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.BadRequestError, match="'top_k' is over") as refused:
        chat(client, extra_body={"top_k": 1 << 31})
    assert refused.value.param == "top_k"
    turns: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(anthropic.BadRequestError, match="'top_k' is over"):
        claude.messages.create(model="tiny", max_tokens=4, messages=turns, extra_body={"top_k": 1 << 31})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat(client, model="nobody")


TURN: Any = [{"role": "user", "content": "ward 3"}]
ROUTES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "ward 3", "max_tokens": 16, "ignore_eos": True},
    "chat/completions": {"messages": TURN, "max_tokens": 16, "ignore_eos": True},
    "responses": {"input": "ward 3", "max_output_tokens": 16},
    "messages": {"messages": TURN, "max_tokens": 16},
}
"""Route → what a user asks for there."""
LONG = 400
"""Tokens of the answer that all others wait for."""


async def answered(site: SiteProcess, running: str, waiting: list[str]) -> list[str]:
    """Ask for a LONG answer of the class `running`, then once per route for each class of `waiting`; return the order.

    The site's own classes are asked for as the operator may, by their number.
    """
    scheduler = next(child for child in site.family() if "scheduler" in " ".join(child.cmdline()))
    operator = {"authorization": f"Bearer {(site.state_dir / 'admin.key').read_text()}"}
    order: list[str] = []
    began = asyncio.Event()

    async def long_one() -> None:
        body = {"model": "tiny", "prompt": "ward 3", "max_tokens": LONG, "ignore_eos": True, "priority": running}
        said = ""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                said += line
                began.set()
        assert f'"completion_tokens":{LONG}' in said.replace(" ", ""), "none of it was lost"
        order.append("long")

    async def ask(name: str, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        reply = await http.post(path, json=body, headers=headers)
        assert reply.status_code == 200, (name, path, reply.text)
        order.append(name)

    async with httpx.AsyncClient(base_url=site.url, timeout=120) as http, asyncio.TaskGroup() as asked:
        asked.create_task(long_one())
        await began.wait()
        scheduler.suspend()  # until all have come
        try:
            for name in waiting:
                if name not in CLASSES:
                    body = {"text": "ward 3", "sampling_params": {"max_new_tokens": 16, "ignore_eos": True}}
                    body["priority"] = Priority[name.upper()]
                    asked.create_task(ask(name, "/generate", body, operator))
                    continue
                for route, fields in ROUTES.items():
                    body = {"model": "tiny", "temperature": 0, "priority": name, **fields}
                    asked.create_task(ask(name, f"/v1/{route}", body, {}))
            users = 1 + len(ROUTES) * sum(name in CLASSES for name in waiting)
            while sum((await http.get("/umbel/inflight", headers=operator)).json().values()) < users:
                await asyncio.sleep(0.05)
        finally:
            scheduler.resume()
    return order


def test_a_full_engine_answers_class_by_class_and_no_user_takes_anothers_place(site: SiteProcess) -> None:
    order = asyncio.run(answered(site, "interactive", ["check", "mirror", "batch", "interactive"]))
    assert order == ["long", *["interactive"] * 4, *["batch"] * 4, "mirror", "check"]


def test_a_user_who_waits_takes_the_place_of_one_who_does_not(site: SiteProcess) -> None:
    order = asyncio.run(answered(site, "batch", ["mirror", "interactive"]))
    assert order == [*["interactive"] * 4, "long", "mirror"]


def test_a_number_of_ones_own_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'priority' is 1000; use 'interactive' or 'batch'"):
        chat(client, extra_body={"priority": 1000})
