"""`SAMPLING`: fields of all of OpenAI's routes that say how an answer is drawn, and their bounds."""

import math
from typing import Any

from serving.priorities import CLASSES
from serving.router.fields.schemas import grammar
from serving.router.fields.values import (
    INT64,
    Check,
    array,
    by_type,
    choice,
    flag,
    integer,
    name,
    number,
    record,
    refuse,
    text,
    token_ids,
)

MOST_ANSWERS = 128
"""Answers to one request: SGLang makes a copy of it for each at once."""
MOST_TOKENS = 1 << 24
"""Highest number of tokens that can be asked for; SGLang lowers it to what is left of the base's context."""
MOST_TOP_K = 1 << 20
MOST_LOGPROBS = 20
MOST_STOPS = 16
LONGEST_STOP = 256
"""Characters; SGLang decodes as many tokens again after each token of the answer."""
MOST_BIASES = 1024

tokens = integer(1, MOST_TOKENS)
priority = choice(*CLASSES)
_top_k = integer(-1, MOST_TOP_K)
_stops = array(text(LONGEST_STOP), MOST_STOPS)
json_schema = by_type({
    "text": record({"type": name}),
    "json_object": record({"type": name}),
    "json_schema": record(
        {
            "type": name,
            "json_schema": record(
                {"name": name, "description": text(), "schema": grammar, "strict": flag}, needed=("schema",)
            ),
        },
        needed=("json_schema",),
    ),
})  # fmt: skip
"""`response_format`."""


def stop_texts(value: Any, where: str, vocab: int) -> list[str]:
    """Take texts at which an answer ends; '' means none, and is left out, as an answer would end at its first token."""
    return [one for one in _stops(value, where, vocab) if one]


def stop(value: Any, where: str, vocab: int) -> Any:
    """Take a text at which an answer ends, or a list of some."""
    one = text(LONGEST_STOP)
    return one(value, where, vocab) or [] if isinstance(value, str) else stop_texts(value, where, vocab)


def top_k(value: Any, where: str, vocab: int) -> int:
    """Take the number of likeliest tokens to choose from; -1 is all of them, and so is 0, as in vLLM."""
    return int(_top_k(value, where, vocab)) or -1


def logit_bias(value: Any, where: str, vocab: int) -> dict[str, float]:
    """Take token id → what is added to its logit, -100 to 100."""
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        refuse(where, f"is no object of at most {MOST_BIASES} tokens", 'send {"TOKEN ID": BIAS}')
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 11 and int(token) < vocab):
            refuse(where, f"holds {token[:100]!r}, which is no token id of the base", f"send 0 to {vocab - 1}")
        if (
            isinstance(bias, bool)
            or not isinstance(bias, int | float)
            or not (math.isfinite(bias) and abs(bias) <= 100)
        ):
            refuse(f"{where}.{token}", "is no number from -100 to 100", "send one")
    return value


PENALTIES: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": top_k,
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 2),
    "stop": stop,
    "stream": flag,
    "priority": priority,
    "cache_salt": text(LONGEST_STOP),
}
"""Fields of all three routes."""
SAMPLING: dict[str, Check] = {
    **PENALTIES,
    "n": integer(1, MOST_ANSWERS),
    "max_tokens": tokens,
    "min_tokens": integer(0, MOST_TOKENS),
    "seed": integer(-INT64, INT64),
    "logit_bias": logit_bias,
    "stop_token_ids": token_ids(MOST_STOPS, least=0),
    "ignore_eos": flag,
    "no_stop_trim": flag,
    "skip_special_tokens": flag,
    "response_format": json_schema,
    "stream_options": record(
        {"include_usage": flag, "continuous_usage_stats": flag}, dropped=frozenset({"include_obfuscation"})
    ),
}
"""Fields of chat and of plain completions."""
SENT_ANYWAY = frozenset({
    "litellm_call_id", "litellm_metadata", "litellm_session_id", "litellm_trace_id", "metadata", "prompt_cache_key",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user", "verbosity",
})  # fmt: skip
"""Fields that clients and gateways send and that change no answer here: they are left out of what SGLang gets."""
