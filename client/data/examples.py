"""A file of examples: JSONL in one of three shapes, as turns of a chat.

No message of this module holds text of an example: it says the line, and what is expected there.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.data.chat_tokens import Turn
from umbel.errors import DataError

MAX_LINE = 4 << 20
"""Bytes a line may have; far above any seq_len, far below memory."""
EXPECTED = (
    'expected a JSON object with "messages" (a list of {"role", "content"}), with "prompt" and "completion", or with '
    '"instruction", "output" and perhaps "input"'
)
_SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "output"))


def read(path: Path) -> Iterator[tuple[str, list[Turn]]]:
    """(file:line, turns) of every example; blank lines are skipped."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise DataError(f"{where}: over {MAX_LINE >> 20} MiB in one line; write one example per line")
            if line.strip():
                turns = parse(line.removeprefix(b"\xef\xbb\xbf"), where)
                if not any(content.strip() for role, content in turns if role == "assistant"):
                    raise DataError(f"{where}: the answer is empty; write one or remove the line")
                yield where, turns


def check(path: Path, examples: int = 100) -> None:
    """Read the first `examples` of a file; raise DataError for one that cannot be used, or where there is none."""
    if not list(itertools.islice(read(path), examples)):
        raise DataError(f"{path}: holds no example; {EXPECTED}, one per line")


def parse(line: bytes, where: str) -> list[Turn]:
    """One line of JSONL as (role, content) turns; raise DataError, naming `where`, for anything else."""
    try:
        example = json.loads(line.decode())
        json.dumps(example, ensure_ascii=False).encode()  # a lone surrogate is JSON, but no text
    except UnicodeError as error:
        raise DataError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); {EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON that can be read; {EXPECTED}") from error
    if not isinstance(example, dict):
        raise DataError(f"{where}: not a JSON object; {EXPECTED}")
    shapes = [shape for shape in _SHAPES if all(field in example for field in shape)]
    if len(shapes) != 1:
        raise DataError(f"{where}: {'more than one kind' if shapes else 'no kind'} of example; {EXPECTED}")
    if shapes[0] == ("messages",):
        return _messages(example["messages"], where)
    question, answer = (_text(example, field, where) for field in shapes[0])
    if "instruction" in shapes[0] and example.get("input") is not None:
        question = "\n\n".join(filter(None, (question, _text(example, "input", where))))
    return [("user", question), ("assistant", answer)]


def _text(example: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(example[field], str):
        raise DataError(f'{where}: "{field}" is {_kind(example[field])}; expected a string')
    return str(example[field])


def _messages(messages: object, where: str) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" is {_kind(messages)}; expected a list of {{"role", "content"}}')
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f'{where}: messages[{index}]: expected an object with "role" and "content" and no more')
        inside = f"{where}: messages[{index}]"
        turns.append((_text(message, "role", inside), _text(message, "content", inside)))
    if all(role != "assistant" for role, _ in turns):
        raise DataError(f'{where}: no message has the role "assistant", so there is no answer to learn')
    return turns


def _kind(value: object) -> str:
    if value is None or value in ([], ""):
        return "empty"
    return {dict: "an object", list: "a list", bool: "a boolean", str: "a string"}.get(type(value), "a number")
