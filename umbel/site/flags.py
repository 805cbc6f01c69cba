"""The rules for `[engine.extra_args]` and `[engine.env]`: serving must compute what is trained, for everyone's prompts.

A flag is owned by umbel, refused with the remedy, or passed on to SGLang; `flag_table` says which. A name that is not
SGLang's is refused, too, and so is a shortened one: SGLang would complete it, and it would hide from these rules.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from umbel.site.flag_table import KNOWN, NEUTRAL_VALUES, OWNED_FLAGS, REFUSED_FLAGS

SGLANG = "0.5.23"
"""Release of SGLang that the table of flags was made for."""
_NUMBER = re.compile(r"-\d+|-\d*\.\d+")
"""Words with a dash in front that argparse takes for a value."""
_OFF = re.compile(r"\s*(0*\.?0*|false|no?|f)\s*", re.IGNORECASE)
"""Values with which a variable of SGLang is off."""
ORDERED = ("fcfs", "lof")
"""`schedule_policy` with which SGLang orders requests by their class, the default first."""

_OTHER_MODEL = "the engine would compute another model than the one that is trained"
_OTHER_ATTENTION = "the engine would round or skip parts of its attention, which training computes in full"
REFUSED_VARIABLES = {
    "SGLANG_RUST_SERVER": "it replaces the HTTP server that umbel's router lives in",
    "SGLANG_HTTP_SERVER_APP_PATH": "it replaces the HTTP server that umbel's router lives in",
    "SGLANG_GRPC_PORT": "it goes around the HTTP server that umbel's router lives in, with its versions and its keys",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": _OTHER_MODEL,
    "SGLANG_DISABLED_MODEL_ARCHS": _OTHER_MODEL,
    "SGLANG_USE_MLX": _OTHER_MODEL,
    "SGLANG_INT4_WEIGHT": _OTHER_MODEL,
    "SGLANG_DEBUG_REVERT_PR": _OTHER_MODEL,
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "prompts could be longer than the base can tell positions apart",
    "SGLANG_TRITON_FP8_PREFILL_ATTN": _OTHER_ATTENTION,
    "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR": _OTHER_ATTENTION,
    "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR": _OTHER_ATTENTION,
    "SGLANG_TOOL_STRICT_LEVEL": "the engine would compile the schemas of all tools, also those that users may send "
    "at any cost because they are only shown to the model; a user's 'strict' does it for one tool",
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "the KV cache would take the memory that is kept for training",
    "SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE": "the engine would say prescribed tokens",
    "SGLANG_KV_CANARY_PERTURB_REAL_KV_USED_PROB": "the engine would damage its own cache",
    "SGLANG_KV_CANARY_PERTURB_REQ_TO_TOKEN_PROB": "the engine would damage its own cache",
    "SGLANG_KV_CANARY_PERTURB_NEXT_TOKEN_SWAP_PROB": "the engine would damage its own cache",
}
"""Environment variables of SGLang that cannot be used → why."""


def plain(flag: str) -> str:
    """Return a flag's name as the tables write it: `--Max-Total-Tokens` is `max_total_tokens`."""
    return flag.lstrip("-").replace("-", "_").lower()


def flag_refusal(flag: str, value: Any) -> str | None:
    """Return why umbel cannot start SGLang with this entry of `[engine.extra_args]`, and the remedy; None if it can.

    `False` leaves a flag out, so it is refused only for a flag that umbel sets, or that does not exist.
    """
    name = plain(flag)
    if name not in KNOWN:
        return _unknown(flag, name)
    if name in OWNED_FLAGS:
        return f"{flag} is set by {OWNED_FLAGS[name]}; remove it here"
    if value is False:
        return None
    if name in REFUSED_FLAGS and (value is True or str(value) not in NEUTRAL_VALUES.get(name, ())):
        shown = "…" if "password" in name else repr(value)
        return f"{flag} = {shown} cannot be served by umbel: {REFUSED_FLAGS[name]}"
    if flag.lstrip("-").replace("-", "_") != name:
        return f"{flag} is {name} at SGLang, in small letters; write it so"
    return _value_refusal(flag, value)


def pair_refusal(args: Mapping[str, Any]) -> str | None:
    """Return why SGLang would not start with two of these flags together, and the remedy; None if it does."""
    given = {plain(flag): value for flag, value in args.items()}
    policy = given.get("schedule_policy", ORDERED[0])
    if given.get("enable_priority_scheduling") and policy not in ORDERED:
        return (
            f"schedule_policy = {policy!r}: with enable_priority_scheduling SGLang takes only "
            f"{' or '.join(map(repr, ORDERED))}; set one of them, or leave it out"
        )
    return None


def _unknown(flag: str, name: str) -> str:
    longer = sorted(known for known in KNOWN if known.startswith(name)) if name else []
    if longer:
        written_out = longer[0] if len(longer) == 1 else f"one of {', '.join(longer[:4])}"
        why = flag_refusal(longer[0], "…") if len(longer) == 1 and longer[0] not in NEUTRAL_VALUES else None
        return f"{flag} is short for {written_out}; " + (why or "write it out")
    near = difflib.get_close_matches(name.partition("=")[0], KNOWN, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "see `python -m sglang.launch_server --help`"
    return f"{flag} is no flag of SGLang {SGLANG}; {hint}"


def _value_refusal(flag: str, value: Any) -> str | None:
    """Return why a value would not reach its flag as one word, or one word per item of a list."""
    for word in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(word, str | int | float):
            return f"{flag}: {word!r} is no text, number, or true; write JSON as text, such as '{{\"a\": 1}}'"
        if isinstance(word, str) and word.startswith("-") and not _NUMBER.fullmatch(word):
            return f"{flag}: SGLang would read {word!r} as another flag; give each flag a line of its own"
    return None


def variable_refusal(name: str, value: str) -> str | None:
    """Return why the engine cannot have this environment variable; None if it can."""
    if name not in REFUSED_VARIABLES or _OFF.fullmatch(value):
        return None
    return f"{name} cannot be set for umbel's engine: {REFUSED_VARIABLES[name]}; remove it"


def refused_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a line for each variable of an environment that the engine cannot have."""
    refusals = (variable_refusal(name, value) for name, value in sorted(environment.items()))
    return [why for why in refusals if why]
