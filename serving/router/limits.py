"""`refusal`: refuse requests that would cost the engine far more than the user, or that reach for others' data."""

from collections.abc import Mapping
from typing import Any

from serving.aliases import CLASSES

MOST = {"n": 128, "best_of": 128, "top_logprobs": 20, "logprobs": 20}
"""Field → its highest value: OpenAI's own limits or higher ones. SGLang makes `n` copies of a request at once."""
MOST_PROMPTS = 256
"""Highest number of prompts in one request."""
NOT_FOR_USERS = (
    "custom_logit_processor", "session_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank",
    "data_parallel_rank", "rid", "previous_response_id", "background",
)  # fmt: skip
"""Fields that run pickled code, reach other users' sessions and requests or other machines, or choose a worker."""


def refusal(request: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (reason, field) if a request is refused; None if it may go on."""
    for field in NOT_FOR_USERS:
        if request.get(field) not in (None, False):
            return f"'{field}' cannot be chosen here; leave it out.", field
    priority = request.get("priority")
    if isinstance(priority, str) and priority not in CLASSES:
        return f"'priority' is {priority[:200]!r}; use 'interactive', 'batch', or a number.", "priority"
    for field, most in MOST.items():
        asked = request.get(field)
        if isinstance(asked, str):  # SGLang would read it as a number
            return f"'{field}' is a string; send a number.", field
        if isinstance(asked, int | float) and not asked <= most:
            return f"'{field}' is over {most}; ask for less.", field
    for field in ("prompt", "input"):
        if _texts(request.get(field)) > MOST_PROMPTS:
            return f"'{field}' holds more than {MOST_PROMPTS} texts; send several requests.", field
    return None


def _texts(prompt: object) -> int:
    """Count the texts in a prompt; token ids are not counted, as a list of them is one prompt."""
    return sum(not isinstance(part, int) for part in prompt) if isinstance(prompt, list) else 1
