"""Read a file of examples: JSONL in one of three shapes, as turns of a chat; count them and hold some out.

No message of this module holds text of an example: a message names the line and the expected shape.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.chat_tokens import Turn
from umbel.errors import DataError

MAX_LINE = 4 << 20
"""Largest line in bytes; far above any seq_len, far below memory."""
EXPECTED = (
    'expected a JSON object with "messages" (a list of {"role", "content"}), with "prompt" and "completion", or with '
    '"instruction", "output" and perhaps "input"'
)
_SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "output"))


@dataclass(frozen=True)
class Counts:
    """Number of examples to train on, and of those held out for probes."""

    train: int
    held_out: int


def count(data: Path, eval_data: Path | None, eval_fraction: float) -> Counts:
    """Count a site's examples as preparation splits them, without a tokenizer: fast, and offline.

    Examples that preparation drops because seq_len leaves no token of their answer are still counted. Raises DataError
    for the first example of either file that cannot be used, and for a file without one.
    """
    every = contents(data)
    if eval_data is not None:
        return Counts(len(every), len(contents(eval_data)))
    kept_back = held_out(every, eval_fraction)
    number = sum(content in kept_back for content in every)
    return Counts(len(every) - number, number)


def contents(path: Path) -> list[str]:
    """Return the `content_of` every example in a file; raise DataError for a bad example, or where there is none."""
    found = [content_of(turns) for _, turns in read(path)]
    if not found:
        raise DataError(f"{path}: holds no example; {EXPECTED}, one per line")
    return found


def content_of(turns: list[Turn]) -> str:
    """Return the sha256 of an example's turns, as hexadecimal digits. It decides the side of the split."""
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def held_out(all_contents: Iterable[str], fraction: float) -> set[str]:
    """Choose about `fraction` of the distinct examples, by their `content_of`.

    An example's side does not depend on the other examples, and duplicates share one side. Neither side may be empty;
    a single example is for training.
    """
    distinct = sorted(set(all_contents))
    chosen = {content for content in distinct if int(content, 16) < fraction * 2**256}
    return (chosen | set(distinct[:1])) - set(distinct[-1:])


def read(path: Path) -> Iterator[tuple[str, list[Turn]]]:
    """Yield (file:line, turns) for every example, skipping blank lines; raise DataError for one that cannot be used."""
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


def parse(line: bytes, where: str) -> list[Turn]:
    """Parse one line of JSONL into (role, content) turns; raise DataError, naming `where`, for anything else."""
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
