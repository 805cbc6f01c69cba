"""Functions that an answer may call: checks of OpenAI's `tools`, of Responses' and of Anthropic's.

The schema of a function's arguments is compiled where a call is certain (`tool_choice`) or strict; else it is shown.
"""

from typing import Any

from serving.router.fields.schemas import compiled_if
from serving.router.fields.values import LONGEST_NAME, Check, by_type, choice, flag, free, name, only, record, text

MOST_TOOLS = 128
MOST_BYTES = 256 << 10
"""Characters of all tools of a request: SGLang checks their schemas before it answers anybody else."""
CERTAIN = ("required", "any", "tool", "function")
"""Kinds of `tool_choice` with which an answer is made to be a call."""

call_id = text(LONGEST_NAME)
"""The id of a call; some servers give none, and their clients send '' back."""
_schema = free()  # `tools` looks at it again, once it is known whether it is compiled
_hint = frozenset({"cache_control"})
CHAT_TOOL = record(
    {
        "type": only("function", "only functions can be called"),
        "function": record(
            {"name": name, "description": text(), "parameters": _schema, "strict": flag},
            dropped=_hint,
            needed=("name",),
        ),
    },
    dropped=_hint,
    needed=("function",),
)
RESPONSES_TOOL = by_type({
    "function": record(
        {"type": name, "name": name, "description": text(), "parameters": _schema, "strict": flag}, needed=("name",)
    ),
})  # fmt: skip
ANTHROPIC_TOOL = by_type(
    {
        "custom": record(
            {"type": name, "name": name, "description": text(), "input_schema": _schema, "strict": flag},
            dropped=frozenset({"cache_control", "eager_input_streaming", "input_examples", "allowed_callers"}),
            needed=("name", "input_schema"),
        )
    },
    otherwise="custom",
)


def _or_word(other: Check) -> Check:
    """Take 'auto', 'none', 'required', or a function by its name, in the form of `other`."""
    word = choice("auto", "none", "required")

    def check(value: Any, where: str, vocab: int) -> Any:
        return (word if isinstance(value, str) else other)(value, where, vocab)

    return check


_named = record({"name": name}, needed=("name",))
CHAT_CHOICE = _or_word(by_type({"function": record({"type": name, "function": _named}, needed=("function",))}))
RESPONSES_CHOICE = _or_word(by_type({"function": record({"type": name, "name": name}, needed=("name",))}))
_parallel: dict[str, Check] = {"type": name, "disable_parallel_tool_use": flag}
ANTHROPIC_CHOICE = by_type({
    "auto": record(_parallel), "any": record(_parallel), "none": record(_parallel),
    "tool": record({**_parallel, "name": name}, needed=("name",)),
})  # fmt: skip


def require_schemas(request: dict[str, Any], vocab: int) -> None:
    """Check the schemas of all tools of a request, now that it is known which of them are compiled."""
    wanted = request.get("tool_choice")
    certain = (wanted.get("type") if isinstance(wanted, dict) else wanted) in CERTAIN
    tools = request.get("tools") or []
    free(MOST_BYTES)(tools, "tools", vocab)
    for index, tool in enumerate(tools):
        function, where = tool.get("function", tool), f"tools[{index}]"
        where += ".function" if "function" in tool else ""
        for field in ("parameters", "input_schema"):
            if field in function:
                compiled_if(certain or function.get("strict", False))(function[field], f"{where}.{field}", vocab)
