"""`parse`, `serialise`: between the bytes of a body and the request, which has one meaning for every reader."""

import json
from typing import Any, NoReturn

from umbel.errors import RequestRefused
from umbel.wire import repeated_key


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises RequestRefused for what is no JSON or no object, for a key that is there twice, and for NaN and Infinity.
    """
    try:
        request = json.loads(body, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError as error:
        raise RequestRefused("The body is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:
        if isinstance(error, RequestRefused):
            raise
        raise RequestRefused("The body is not valid JSON.") from error
    if not isinstance(request, dict):
        raise RequestRefused("The body is not a JSON object; send {\"model\": …}.")  # fmt: skip
    return request


def serialise(request: dict[str, Any]) -> bytes:
    """Return a request as UTF-8 JSON, without spaces; only numbers may be longer in it than in the body it is from.

    Raises RequestRefused for text that cannot be written (half a surrogate pair).
    """
    try:
        return json.dumps(request, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise RequestRefused("The body is not valid JSON: it holds half of a surrogate pair.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        raise RequestRefused(f"The body holds {twice[:100]!r} twice; leave one out.", twice[:100])
    return dict(pairs)


def _no_number(name: str) -> NoReturn:
    raise RequestRefused(f"The body is not valid JSON: {name} is no number of it.")
