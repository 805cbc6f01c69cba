"""The fields of `/v1/chat/completions`."""

from serving.router.fields.sampling import MOST_LOGPROBS, SAMPLING, SENT_ANYWAY, tokens
from serving.router.fields.tools import CHAT_CHOICE, CHAT_TOOL, MOST_TOOLS, call_id
from serving.router.fields.values import (
    LONGEST_NAME,
    Check,
    array,
    by_type,
    choice,
    flag,
    free,
    integer,
    name,
    only,
    record,
    text,
    text_or,
)

MOST_MESSAGES = 10_000
MOST_PARTS = 1000
"""Parts of one message."""
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

effort = choice(*EFFORTS)
template_arguments = record({"enable_thinking": flag, "thinking": flag, "reasoning_effort": effort})
"""`chat_template_kwargs`: arguments of the base's own chat template, by name."""

_aside = frozenset({"cache_control", "extra_content", "id", "provider_specific_fields"})
"""What other servers and gateways add to their answers, and their clients send back."""
_part = by_type({
    "text": record(
        {"type": name, "text": text()}, dropped=_aside | {"annotations", "citations", "index"}, needed=("text",)
    ),
    "refusal": record({"type": name, "refusal": text()}),
})  # fmt: skip
_call = record(
    {
        "id": call_id,
        "index": integer(0, MOST_TOOLS),
        "type": only("function", "only functions can be called"),
        "function": record(
            {"name": name, "arguments": text_or(free())}, dropped=_aside | {"parsed_arguments"}, needed=("name",)
        ),
    },
    dropped=_aside - {"id"},
    needed=("function",),
)
_message = record(
    {
        "role": choice(*ROLES),
        "content": text_or(array(_part, MOST_PARTS)),
        "name": text(LONGEST_NAME),
        "reasoning_content": text(),
        "tool_call_id": call_id,
        "tool_calls": array(_call, MOST_TOOLS),
    },
    dropped=_aside | {
        "annotations", "audio", "metadata", "parsed", "phase", "reasoning", "reasoning_details", "refusal",
        "thinking_blocks",
    },
    needed=("role",),
)  # fmt: skip
FIELDS: dict[str, Check] = {
    **SAMPLING,
    "messages": array(_message, MOST_MESSAGES),
    "max_completion_tokens": tokens,
    "logprobs": flag,
    "top_logprobs": integer(0, MOST_LOGPROBS),
    "tools": array(CHAT_TOOL, MOST_TOOLS),
    "tool_choice": CHAT_CHOICE,
    "parallel_tool_calls": flag,
    "reasoning_effort": effort,
    "chat_template_kwargs": template_arguments,
    "continue_final_message": flag,
    "separate_reasoning": flag,
    "stream_reasoning": flag,
    "return_token_ids": flag,
    "return_prompt_token_ids": flag,
    "modalities": array(choice("text"), 1),
}
DROPPED = SENT_ANYWAY | {"modalities", "prediction"}
