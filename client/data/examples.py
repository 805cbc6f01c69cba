"""Read a file of examples: JSON Lines or one JSON array, also gzipped; hold some examples out.

No message of this module holds text of an example: a message names the line and the expected shape.
"""

import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from client.data.conversation import Conversation
from client.data.shapes import EXPECTED, conversation_of
from client.data.tool_fields import once
from umbel.errors import DataError

MAX_LINE = 4 << 20
"""Largest line in bytes; far above any seq_len, far below memory."""
MAX_ARRAY = 1 << 30
"""Largest file in bytes that may be one JSON array, which has to be read as a whole."""
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"ARROW1": "an Arrow file",
    b"SQLite": "a SQLite database",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of a file → what it is."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One example of a file, or why it is refused."""

    number: int
    """Number of its line, or of the item in a JSON array; from 1 on."""
    conversation: Conversation | None
    refused: DataError | None = None


def held_out(groups: Iterable[str], fraction: float) -> set[str]:
    """Choose about `fraction` of the distinct groups of examples (`group_of`).

    A group's side does not depend on the other groups. Neither side may be empty; a single group is for training.
    """
    distinct = sorted(set(groups))
    chosen = {group for group in distinct if int(group, 16) < fraction * 2**256}
    return (chosen | set(distinct[:1])) - set(distinct[-1:])


def read(path: Path) -> Iterator[tuple[str, Conversation]]:
    """Yield (file:line, conversation) for every example; raise DataError for the first that cannot be used."""
    for line in lines(path):
        if line.refused is not None:
            raise line.refused
        assert line.conversation is not None
        yield f"{path}:{line.number}", line.conversation


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits. Raises DataError for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); see the site file") from error


def half_written(path: Path) -> bool:
    """Return whether a file of JSON Lines ends with half a line: no line break, and no JSON. An array is never one."""
    try:
        with path.open("rb") as file:
            start = file.read(64).removeprefix(_BOM).lstrip()
            file.seek(max(0, file.seek(0, io.SEEK_END) - MAX_LINE))
            _, ended, last = file.read().rpartition(b"\n")
    except OSError:  # gone meanwhile
        return False
    foreign = (*_FOREIGN, _GZIP, b"[")
    if start.startswith(foreign) or not last.strip() or (len(last) >= MAX_LINE and not ended):
        return False
    try:
        json.loads(last.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return True
    return False


def lines(path: Path) -> Iterator[Line]:
    """Yield every example of a file, also those that are refused; blank lines are none.

    Raises DataError where the file as a whole cannot be read: damaged gzip, another format, one endless line.
    """
    with path.open("rb") as raw:
        start = raw.read(8)
        raw.seek(0)
        what = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
        if what is not None:
            raise DataError(f"{path}: this is {what}; convert it to JSON Lines in UTF-8, one example per line")
        if not start.startswith(_GZIP):
            yield from _examples(raw, path)
            return
        try:
            with gzip.open(raw) as unpacked:
                yield from _examples(unpacked, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: gzip that is cut or damaged ({error}); copy it again") from error


def _examples(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[Line]:
    began = False
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        text = line.removeprefix(_BOM)
        if not began and text.lstrip().startswith(b"["):  # no example begins so: one array holds them all
            yield from _array(b"".join([text, file.read(MAX_ARRAY + 1)]), path, number)
            return
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: over {MAX_LINE >> 20} MiB in one line; write one example per line")
        if text.strip():
            began = True
            yield _line(text, f"{path}:{number}", number)


def _line(line: bytes, where: str, number: int) -> Line:
    try:
        return Line(number, parse(line, where))
    except DataError as refused:
        return Line(number, None, refused)


def _array(text: bytes, path: Path, first: int) -> Iterator[Line]:
    """Yield the items of a file that is one JSON array; its first line is `first`."""
    if len(text) > MAX_ARRAY:
        raise DataError(f"{path}: one JSON array of over {MAX_ARRAY >> 30} GiB; write one example per line")
    for number, item in enumerate(_value(text, f"{path}:{first}"), start=1):
        where = f"{path}:{number}"
        try:
            yield Line(number, _conversation(item, where))
        except DataError as refused:
            yield Line(number, None, refused)


def parse(line: bytes, where: str) -> Conversation:
    """Return the conversation of one line of JSON Lines; raise DataError, naming `where`, for anything else."""
    return _conversation(_value(line, where), where)


def _conversation(example: object, where: str) -> Conversation:
    if isinstance(example, list):
        raise DataError(f'{where}: a list, and not a JSON object; write a list of messages as {{"messages": […]}}')
    if not isinstance(example, dict):
        raise DataError(f"{where}: not a JSON object; {EXPECTED}")
    return conversation_of(example, where)


def _value(text: bytes, where: str) -> Any:
    """Parse JSON; raise DataError, naming `where`, for anything else."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=lambda pairs: once(pairs, where))
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is JSON, but no text
    except UnicodeError as error:
        raise DataError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        if text.strip() in (b"{", b"},", b"}"):
            raise DataError(
                f"{where}: JSON over several lines; write one example per line: `jq -c . FILE`, or `jq -c '.[]' FILE` "
                "for an array"
            ) from error
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); {EXPECTED}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON that can be read; {EXPECTED}") from error
    return value
