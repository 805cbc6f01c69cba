"""The fields of `/v1/responses`. What it echoes (`metadata`, `user`, …) goes through."""

from typing import Any

from serving.router.fields.chat import MOST_MESSAGES, MOST_PARTS, effort, template_arguments
from serving.router.fields.sampling import MOST_LOGPROBS, MOST_TOKENS, PENALTIES
from serving.router.fields.schemas import grammar
from serving.router.fields.tools import MOST_TOOLS, RESPONSES_CHOICE, RESPONSES_TOOL, call_id
from serving.router.fields.values import (
    LONGEST_NAME,
    Check,
    array,
    by_type,
    choice,
    flag,
    integer,
    name,
    only,
    record,
    refuse,
    text,
    text_or,
)

LEAST_OUTPUT = 3
"""Tokens of the shortest answer that can be asked for: SGLang stops two before `max_output_tokens`."""
MOST_METADATA = 16
LONGEST_METADATA = 512
"""Characters of a value; a key has at most LONGEST_NAME."""

_aside = {"id": text(), "status": text(LONGEST_NAME)}
_sent_anyway = frozenset({"phase", "provider_specific_fields"})
_said: dict[str, Check] = {"type": name, "text": text()}
_quoted = frozenset({"annotations", "logprobs", "parsed"})
_part = by_type({
    "input_text": record(_said, needed=("text",)),
    "output_text": record(_said, dropped=_quoted, needed=("text",)),
    "text": record(_said, needed=("text",)),
    "refusal": record({"type": name, "refusal": text()}),
})  # fmt: skip
_thought = array(by_type({kind: record(_said) for kind in ("summary_text", "reasoning_text")}), MOST_PARTS)
_texts = text_or(array(_part, MOST_PARTS))
_item = by_type(
    {
        "message": record(
            {**_aside, "type": name, "role": choice("system", "developer", "user", "assistant"), "content": _texts},
            dropped=_sent_anyway,
            needed=("role", "content"),
        ),
        "function_call": record(
            {**_aside, "type": name, "call_id": call_id, "name": name, "arguments": text()},
            dropped=_sent_anyway | {"parsed_arguments"},
            needed=("call_id", "name"),
        ),
        "function_call_output": record(
            {**_aside, "type": name, "call_id": call_id, "output": _texts}, needed=("call_id", "output")
        ),
        "reasoning": record(
            {**_aside, "type": name, "summary": _thought, "content": _thought, "encrypted_content": text()}
        ),
    },
    otherwise="message",
)
_format = by_type({
    "text": record({"type": name}),
    "json_object": record({"type": name}),
    "json_schema": record(
        {"type": name, "name": name, "description": text(), "schema": grammar, "strict": flag}, needed=("schema",)
    ),
})  # fmt: skip


def metadata(value: Any, where: str, vocab: int) -> dict[str, str]:
    """Take a few names and texts, which the answer repeats."""
    if not isinstance(value, dict) or len(value) > MOST_METADATA or any(len(key) > LONGEST_NAME for key in value):
        refuse(where, f"is no object of at most {MOST_METADATA} texts with short names", "send fewer")
    return {key: text(LONGEST_METADATA)(one, f"{where}.{key}", vocab) for key, one in value.items()}


FIELDS: dict[str, Check] = {
    **PENALTIES,
    "input": text_or(array(_item, MOST_MESSAGES)),
    "instructions": text(),
    "max_output_tokens": integer(LEAST_OUTPUT, MOST_TOKENS),
    "top_logprobs": integer(0, MOST_LOGPROBS),
    "include": array(choice("message.output_text.logprobs", "reasoning.encrypted_content"), 2),
    "tools": array(RESPONSES_TOOL, MOST_TOOLS),
    "tool_choice": RESPONSES_CHOICE,
    "parallel_tool_calls": flag,
    "max_tool_calls": integer(1, MOST_TOOLS),
    "reasoning": record(
        {"effort": effort, "summary": choice("auto", "concise", "detailed")}, dropped=frozenset({"generate_summary"})
    ),
    "text": record({"format": _format}, dropped=frozenset({"verbosity"})),
    "chat_template_kwargs": template_arguments,
    "truncation": choice("auto", "disabled"),
    "service_tier": choice("auto", "default", "flex", "scale", "priority"),
    "store": flag,
    "metadata": metadata,
    "user": text(LONGEST_METADATA),
    "background": only(False, "an answer is not kept for later"),
}
DROPPED = frozenset({"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "stream_options"})
