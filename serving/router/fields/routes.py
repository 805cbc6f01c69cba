"""`checked`: holds a request against the fields of its route, and returns what of it SGLang gets.

POST /v1/chat/completions {"model": "support", "messages": […], "top_k": 2147483648}
400  'top_k' is over 1048576; ask for less.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serving.router.fields import chat, completions, messages, responses
from serving.router.fields.tools import require_schemas
from serving.router.fields.values import Check, free, refuse


@dataclass(frozen=True)
class Route:
    """The fields of one route."""

    fields: Mapping[str, Check]
    """Field → its check; `model` belongs to every route and is the router's own."""
    dropped: frozenset[str]
    """Fields that clients send and that have no effect here; a check in `fields` holds for them all the same."""
    whole: Callable[[dict[str, Any], int], None]
    """Checks what single fields cannot decide."""


ROUTES = {
    "/v1/chat/completions": Route(chat.FIELDS, chat.DROPPED, require_schemas),
    "/v1/completions": Route(completions.FIELDS, completions.DROPPED, completions.require_few_answers),
    "/v1/responses": Route(responses.FIELDS, responses.DROPPED, require_schemas),
    "/v1/messages": Route(messages.FIELDS, messages.DROPPED, require_schemas),
}
"""Path → its fields."""

MOST_DROPPED = 64 << 10
"""Characters of a field that is dropped: it is in memory until the answer ends."""
_OTHERS = "it reaches for other requests"
_PLACE = "it chooses a machine or a worker"
_OWN = "the router decides it"
_MEDIA = "only text is answered here"
_INSIDE = "it tells of the engine's inside"
_GRAMMAR = "a grammar of your own; use 'response_format' with a JSON schema"
REFUSED = {
    "rid": _OTHERS, "request_id": _OTHERS, "session_id": _OTHERS, "session_params": _OTHERS,
    "previous_response_id": "answers are not kept; send the whole conversation",
    "background": "an answer is not kept for later",
    "bootstrap_host": _PLACE, "bootstrap_port": _PLACE, "bootstrap_room": _PLACE, "routed_dp_rank": _PLACE,
    "disagg_prefill_dp_rank": _PLACE, "data_parallel_rank": _PLACE,
    "lora_path": f"{_OWN}; name a version in 'model'", "extra_key": _OWN, "custom_labels": _OWN,
    "custom_logit_processor": "it is code", "custom_params": "no processor of tokens is here", "watermark": _OWN,
    "input_ids": "the chat template makes the prompt; /v1/completions takes token ids",
    "stop_regex": "it can hold up the engine; use 'stop'",
    "regex": _GRAMMAR, "ebnf": _GRAMMAR, "json_schema": _GRAMMAR,
    "suffix": "nothing fills in before a suffix", "task": "no base here knows it",
    "thinking": "send 'chat_template_kwargs' with 'enable_thinking'",
    "enable_thinking": "send 'chat_template_kwargs' with it", "reasoning": "send 'reasoning_effort'",
    "extra_body": "send what is in it beside the other fields",
    "container": "nothing is run here", "mcp_servers": "no tools are run here", "fallbacks": "name one model",
    "return_hidden_states": _INSIDE, "return_routed_experts": _INSIDE, "routed_experts_start_len": _INSIDE,
    "return_cached_tokens_details": _INSIDE, "return_spec_tokens_details": _INSIDE, "return_meta_info": _INSIDE,
    "return_input_ids_in_sglext": _INSIDE, "return_output_ids_in_sglext": _INSIDE, "return_sampling_mask": _INSIDE,
    "sampling_logprobs_mode": _INSIDE, "return_flat_raw_output_top_logprobs": _INSIDE,
    "return_flat_raw_top_logprobs_b64": _INSIDE,
    "max_dynamic_patch": _MEDIA, "min_dynamic_patch": _MEDIA, "use_audio_in_video": _MEDIA, "images_config": _MEDIA,
    "video_config": _MEDIA, "mm_processor_kwargs": _MEDIA, "audio": _MEDIA,
    "functions": "send 'tools'", "function_call": "send 'tool_choice'",
    "web_search_options": "nothing is searched here", "prompt": "no prompts are kept here; send 'input'",
    "conversation": "no conversations are kept here; send 'input'",
}  # fmt: skip
"""Fields of SGLang and of clients that no route takes unless it lists them → the reason."""


def checked(path: str, request: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """Return what SGLang gets of a request, its fields in the order in which they came.

    `vocab` is the number of tokens of the base's vocabulary. A field that is null is left out. Raises RequestRefused
    with the first field that is not taken.
    """
    route, kept = ROUTES[path], dict[str, Any]()
    for field, value in request.items():
        if value is None:
            continue
        if field == "model":
            kept[field] = value
        elif field in route.fields:
            checked_value = route.fields[field](value, field, vocab)
            if field not in route.dropped:
                kept[field] = checked_value
        elif field in route.dropped:
            free(MOST_DROPPED)(value, field, vocab)
        else:
            reason = REFUSED.get(field)
            if reason is None:
                refuse(field[:100], f"is not a field of {path}", "leave it out")
            refuse(field, f"cannot be chosen here ({reason})", "leave it out")
    route.whole(kept, vocab)
    return kept
