"""What ordinary clients send back or send along is taken, and none of it reaches SGLang."""

import json
from typing import Any

import pytest

from serving.router.fields.body import parse
from serving.router.fields.routes import MOST_DROPPED, checked
from umbel.errors import RequestRefused

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
CALL = {"name": "stock", "arguments": "{}"}
SAID = {"role": "assistant", "content": "a"}
GATEWAYS: list[tuple[str, dict[str, Any], str]] = [  # what gateways add to answers and requests
    (CHAT, {"messages": [{**SAID, field: value}]}, field)
    for field, value in {
        "provider_specific_fields": {"citations": None}, "thinking_blocks": [{"type": "thinking", "thinking": "b"}],
        "reasoning": "b", "reasoning_details": [{"type": "reasoning.text", "text": "b"}], "id": "msg_1",
        "extra_content": {"google": {"thought_signature": "s"}}, "cache_control": {"type": "ephemeral"},
        "metadata": {"trimmed_by": "x"}, "phase": "final_answer",
    }.items()
]  # fmt: skip
GATEWAYS += [
    (CHAT, {"messages": [{**SAID, "tool_calls": [{"function": CALL, field: {"s": "t"}}]}]}, field)
    for field in ("provider_specific_fields", "extra_content")
]
GATEWAYS += [
    (
        CHAT,
        {"messages": [{**SAID, "tool_calls": [{"function": {**CALL, "provider_specific_fields": {}}}]}]},
        "provider",
    ),
    (CHAT, {"tools": [{"function": {"name": "f"}, "cache_control": {"type": "ephemeral"}}]}, "cache_control"),
    (CHAT, {"messages": [SAID], "litellm_session_id": "s"}, "litellm"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "citations": []}]}]}, "citations"),
    (RESPONSES, {"input": [{**SAID, "phase": "commentary"}]}, "phase"),
    (MESSAGES, {"messages": [SAID], "cache_control": {"type": "ephemeral"}, "speed": "fast"}, "speed"),
]


def test_a_key_that_is_there_twice_is_found_in_one_pass() -> None:
    many = ",".join(f'"k{number}":0' for number in range(200_000))
    with pytest.raises(RequestRefused, match="holds 'k7' twice"):
        parse(f'{{{many},"k7":0}}'.encode())


@pytest.mark.parametrize(
    ("path", "request_", "gone"),
    [
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {**CALL, "parsed_arguments": {"a": 1}}}]}]},
            "parsed_arguments",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
            "cache",
        ),
        (
            RESPONSES,
            {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "a", "parsed": {"a": 1}}]}]},
            "parsed",
        ),
        (
            RESPONSES,
            {"input": [{"type": "function_call", "call_id": "c", **CALL, "parsed_arguments": {"a": 1}}]},
            "parsed_arguments",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": "a"}], "context_management": {"edits": []}},
            "context_man",
        ),
        *GATEWAYS,
    ],
)
def test_what_an_sdk_adds_to_its_own_objects_is_left_out(path: str, request_: dict[str, Any], gone: str) -> None:
    taken = checked(path, {"model": "support", **request_}, vocab=1000)
    assert gone in json.dumps(request_)
    assert gone not in json.dumps(taken)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
        {"type": "integer", "format": "int32"},
        {"$id": "x", "oneOf": [{"type": "string"}], "discriminator": {"propertyName": "kind"}},
    ],
)
def test_schemas_of_common_generators_are_taken(schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    request = {"model": "support", "messages": [{"role": "user", "content": "a"}], "response_format": wanted}
    assert checked(CHAT, request, vocab=1000)["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "", "function": CALL}]}]}),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "", "content": "a", "name": ""}]}),
        (RESPONSES, {"input": [{"type": "function_call", "call_id": "", **CALL}]}),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "", "name": "f"}]}]}),
    ],
)
def test_a_call_without_an_id_is_taken_back_as_some_servers_gave_it(path: str, request_: dict[str, Any]) -> None:
    assert checked(path, request_, vocab=1000) == request_


@pytest.mark.parametrize(
    ("path", "request_", "named"),
    [
        (CHAT, {"messages": [{**SAID, "prefix": True}]}, r"messages\[0\].prefix"),
        (CHAT, {"messages": [{**SAID, "function_call": CALL}]}, r"messages\[0\].function_call"),
        (CHAT, {"enable_thinking": False}, "enable_thinking.*; leave it out"),
        (CHAT, {"extra_body": {"top_k": 1}}, "extra_body.*beside the other fields"),
        (CHAT, {"reasoning": {"effort": "low"}}, "send 'reasoning_effort'"),
        (MESSAGES, {"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        (MESSAGES, {"fallbacks": ["another"]}, "fallbacks"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(path: str, request_: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestRefused, match=named):
        checked(path, request_, vocab=1000)


def test_a_field_without_effect_has_a_size_all_the_same() -> None:
    request = {"model": "support", "messages": [{"role": "user", "content": "a"}]}
    assert "metadata" not in checked(CHAT, {**request, "metadata": {"a": "b"}}, vocab=1000)
    with pytest.raises(RequestRefused, match="'metadata'"):
        checked(CHAT, {**request, "metadata": [{}] * MOST_DROPPED}, vocab=1000)
