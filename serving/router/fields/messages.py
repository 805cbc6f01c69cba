"""The fields of `/v1/messages`, Anthropic's."""

from serving.router.fields.chat import MOST_MESSAGES, MOST_PARTS, effort
from serving.router.fields.sampling import priority, stop_texts, tokens, top_k
from serving.router.fields.schemas import grammar
from serving.router.fields.tools import ANTHROPIC_CHOICE, ANTHROPIC_TOOL, MOST_TOOLS, call_id
from serving.router.fields.values import (
    Check,
    array,
    by_type,
    choice,
    flag,
    mapping,
    name,
    number,
    record,
    text,
    text_or,
)

_sent_anyway = frozenset({"cache_control", "citations", "provider_specific_fields", "toolset_name"})
_text = record({"type": name, "text": text()}, dropped=_sent_anyway, needed=("text",))
_texts = text_or(array(by_type({"text": _text}), MOST_PARTS))
_block = by_type({
    "text": _text,
    "tool_use": record(
        {"type": name, "id": call_id, "name": name, "input": mapping},
        dropped=_sent_anyway | {"caller"}, needed=("id", "name"),
    ),
    "tool_result": record(
        {"type": name, "tool_use_id": call_id, "content": _texts, "is_error": flag},
        dropped=_sent_anyway, needed=("tool_use_id",),
    ),
    "thinking": record({"type": name, "thinking": text(), "signature": text()}, needed=("thinking",)),
    "redacted_thinking": record({"type": name, "data": text()}),
})  # fmt: skip
FIELDS: dict[str, Check] = {
    "messages": array(
        record(
            {"role": choice("user", "assistant", "system"), "content": text_or(array(_block, MOST_PARTS))},
            needed=("role", "content"),
        ),
        MOST_MESSAGES,
    ),
    "system": _texts,
    "max_tokens": tokens,
    "stop_sequences": stop_texts,
    "stream": flag,
    "temperature": number(0, 2),
    "top_k": top_k,
    "top_p": number(0, 1, above=True),
    "priority": priority,
    "tools": array(ANTHROPIC_TOOL, MOST_TOOLS),
    "tool_choice": ANTHROPIC_CHOICE,
    "thinking": record({
        "type": choice("enabled", "disabled", "adaptive"), "budget_tokens": tokens,
        "display": choice("summarized", "omitted"),
    }),
    "output_config": record(
        {
            "effort": effort,
            "format": by_type({"json_schema": record({"type": name, "schema": grammar}, needed=("schema",))}),
        },
        dropped=frozenset({"task_budget"}),
    ),
}  # fmt: skip
DROPPED = frozenset({
    "betas", "cache_control", "context_management", "diagnostics", "inference_geo", "metadata", "safety_identifier",
    "service_tier", "speed", "user", "user_profile_id", "workspace_id",
})  # fmt: skip
