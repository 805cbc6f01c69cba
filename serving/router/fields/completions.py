"""The fields of `/v1/completions`."""

from typing import Any

from serving.router.fields.sampling import MOST_ANSWERS, MOST_LOGPROBS, SAMPLING, SENT_ANYWAY
from serving.router.fields.values import Check, flag, integer, refuse, text, token_ids

MOST_PROMPT_TOKENS = 1 << 24


def prompt(value: Any, where: str, vocab: int) -> Any:
    """Take a text, some texts, token ids, or several lists of token ids; none of them may be empty."""
    one, ids = text(least=1), token_ids(MOST_PROMPT_TOKENS)
    if not isinstance(value, list):
        return one(value, where, vocab)
    if not value or isinstance(value[0], int | float):
        return ids(value, where, vocab)
    if len(value) > MOST_ANSWERS:
        refuse(where, f"holds more than {MOST_ANSWERS} texts", "send several requests")
    check = one if isinstance(value[0], str) else ids
    return [check(part, f"{where}[{index}]", vocab) for index, part in enumerate(value)]


def require_few_answers(request: dict[str, Any], vocab: int) -> None:
    """Bound the number of answers of one request: prompts × `n` × `best_of`."""
    asked = request.get("prompt")
    prompts = len(asked) if isinstance(asked, list) and not isinstance(asked[0], int) else 1
    answers = prompts * request.get("n", 1) * request.get("best_of", 1)
    if answers > MOST_ANSWERS:
        field = "n" if "n" in request else "best_of" if "best_of" in request else "prompt"
        refuse(field, f"makes {answers} answers with the prompts and 'best_of', and {MOST_ANSWERS} are allowed",
               "ask for less")  # fmt: skip
    if request.get("echo") and request.get("logprobs") is not None:
        refuse("echo", "needs the probabilities of the whole prompt together with 'logprobs'", "send one of the two")


FIELDS: dict[str, Check] = {
    **SAMPLING,
    "prompt": prompt,
    "best_of": integer(1, MOST_ANSWERS),
    "echo": flag,
    "logprobs": integer(0, MOST_LOGPROBS),
    "return_token_ids": flag,
}
DROPPED = SENT_ANYWAY
