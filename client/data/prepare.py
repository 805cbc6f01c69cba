"""`prepare`: turn a site's JSONL into token files with loss on the answers only, by the base's chat template.

    data.jsonl ──read──► turns ──chat template──► (ids, labels) ──split──► train.npy, eval.npy
    each guard ──the same, without the split──► guard-NAME.npy

Tokenising takes minutes, so the daemon awaits `prepare_in_child`; the same inputs are never prepared twice. No message
of this module holds text of an example: a message names the line and the expected shape.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from client.data.chat_tokens import ChatTokenizer
from client.data.examples import EXPECTED, content_of, held_out, parse, read
from umbel import errors, token_file
from umbel.errors import DataError, TrainingError, UmbelError

RELEASED = "released"
FORMAT = 1
"""Version of the token files, part of every cache key; raise it when the same inputs shall give other files."""


@dataclass(frozen=True)
class Prepared:
    """A site's token files and what went into them."""

    train: Path
    eval: Path
    train_examples: int
    eval_examples: int
    train_loss_tokens: int
    cut: int
    """Examples that were longer than seq_len and lost their end."""
    dropped: int
    """Examples left out because no answer token was left in them."""
    guards: dict[str, Path] = field(default_factory=dict)
    """Name of a guard → its token file."""


@dataclass(frozen=True)
class _Example:
    content: str
    """`content_of` its turns; decides the side of the split."""
    tokens: token_file.LabelledTokens


@dataclass(frozen=True)
class Preparation:
    """The files, the base and the settings that token files are made from."""

    data: Path
    eval_data: Path | None
    """Held-out examples; None: about `eval_fraction` of the distinct examples of `data` are held out."""
    eval_fraction: float
    model: Path
    """Directory of the base, for its tokenizer and chat template."""
    seq_len: int
    """Tokens per example; longer ones are cut."""
    into: Path
    """Directory that the token files are written to."""
    guards: dict[str, Path] = field(default_factory=dict)
    """Name of a guard → its examples."""
    released: Path | None = None
    """Examples that users gave and the operator released, for training only."""


_PREPARATION = TypeAdapter(Preparation)


def prepare(wanted: Preparation) -> Prepared:
    """Tokenise a site's data into a directory of `into`, unless the same inputs are there already.

    Held out of `data` are always the same examples, also after lines were added. Guards are tokenised whole. Released
    examples are trained on unless they are held out or in a guard. One preparation at a time per `into`; the files of
    other inputs are removed (an open file stays readable). Raises DataError naming file and line, ConfigError when the
    base's tokenizer cannot be used.
    """
    data, eval_fraction, seq_len, into = wanted.data, wanted.eval_fraction, wanted.seq_len, wanted.into
    others = {"eval": wanted.eval_data} if wanted.eval_data else {}
    others |= {f"guard-{name}": file for name, file in wanted.guards.items()}
    others |= {RELEASED: wanted.released} if wanted.released else {}
    directory = into / _digest(data, others, eval_fraction, wanted.model, seq_len)
    if not directory.is_dir():
        _remove_superseded(into)
        temporary = into / f".{directory.name}.tmp"
        temporary.mkdir(parents=True, mode=0o700)
        counts = _write(data, others, eval_fraction, ChatTokenizer.load(wanted.model), seq_len, temporary)
        (temporary / "counts.json").write_text(json.dumps(counts))
        os.rename(temporary, directory)
    counts = json.loads((directory / "counts.json").read_text())
    files = {name: directory / f"guard-{name}.npy" for name in wanted.guards}
    return Prepared(directory / "train.npy", directory / "eval.npy", **counts, guards=files)


def _remove_superseded(into: Path) -> None:
    """Remove the token files of other inputs, so that private text does not pile up in forgotten copies."""
    for old in into.glob("*") if into.is_dir() else ():
        if re.fullmatch(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.tmp", old.name):
            shutil.rmtree(old)


def _digest(data: Path, others: Mapping[str, Path], eval_fraction: float, model: Path, seq_len: int) -> str:
    """Return the sha256 of everything that decides the content of the token files."""
    parts: list[object] = [FORMAT, metadata.version("transformers"), seq_len]
    parts += [_digest_file(data), [(name, _digest_file(file)) for name, file in sorted(others.items())]]
    parts += [] if "eval" in others else [eval_fraction]
    for file in sorted(model.glob("*")):  # the tokenizer's files under any name, without the weights
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            parts.append((file.name, _digest_file(file)))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); see the site file") from error


def _write(
    data: Path, others: Mapping[str, Path], eval_fraction: float, tokenizer: ChatTokenizer, seq_len: int, into: Path
) -> dict[str, int]:
    """Write all token files; return the counts of Prepared."""
    train, cut, dropped = _tokenise(data, tokenizer, seq_len)
    sets: dict[str, list[_Example]] = {}
    for name, file in others.items():
        tokenise = _tokenise_given if name == RELEASED else _tokenise
        sets[name], more_cut, more_dropped = tokenise(file, tokenizer, seq_len)
        cut, dropped = cut + more_cut, dropped + more_dropped
    released = sets.pop(RELEASED, [])
    if "eval" not in sets:
        train, sets["eval"] = _split(train, eval_fraction)
    asked = {example.content for examples in sets.values() for example in examples}
    train += [example for example in released if example.content not in asked]
    # One example per row, no packing: attention is causal and nothing else masks it, so that an example packed behind
    # another would read it.
    for name, examples in {"train": train, **sets}.items():
        rows = [example.tokens for example in examples]
        token_file.write(into / f"{name}.npy", rows, seq_len=seq_len, pad_id=tokenizer.pad_id)
    return {
        "train_examples": len(train),
        "eval_examples": len(sets["eval"]),
        "train_loss_tokens": sum(_loss_tokens(example.tokens) for example in train),
        "cut": cut,
        "dropped": dropped,
    }


def _tokenise(path: Path, tokenizer: ChatTokenizer, seq_len: int) -> tuple[list[_Example], int, int]:
    """Return the trainable examples of a file, how many were cut, and how many dropped; raise DataError for none."""
    kept: list[_Example] = []
    total = cut = 0
    for where, turns in read(path):
        ids, labels = tokenizer.encode(turns, where)
        total, cut = total + 1, cut + (len(ids) > seq_len)
        kept += _trainable(turns, (ids[:seq_len], labels[:seq_len]))
    if total == 0:
        raise DataError(f"{path}: holds no example; {EXPECTED}, one per line")
    if not kept:
        cause = (
            f"{cut} of {total} prompts fill seq_len = {seq_len} before their answer begins; raise [training].seq_len"
            if cut
            else "the chat template renders no answer; check its {% generation %} spans"
        )
        raise DataError(f"{path}: no trainable token in any of {total} examples: {cause}")
    return kept, cut, total - len(kept)


def _tokenise_given(path: Path, tokenizer: ChatTokenizer, seq_len: int) -> tuple[list[_Example], int, int]:
    """Do the same as `_tokenise` for examples from users, but drop one that cannot be used: it must stop no site."""
    kept: list[_Example] = []
    total = cut = 0
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where, total = f"{path}:{number}", total + 1
        try:
            turns = parse(line, where)
            ids, labels = tokenizer.encode(turns, where)
        except DataError:
            continue
        cut += len(ids) > seq_len
        kept += _trainable(turns, (ids[:seq_len], labels[:seq_len]))
    return kept, cut, total - len(kept)


def _trainable(turns: Any, tokens: token_file.LabelledTokens) -> list[_Example]:
    """Return the example as a list of one, or an empty list if it has no token to train on."""
    return [_Example(content_of(turns), tokens)] if _loss_tokens(tokens) else []


def _loss_tokens(tokens: token_file.LabelledTokens) -> int:
    return sum(label != token_file.NO_LOSS for label in tokens[1])


def _split(examples: list[_Example], fraction: float) -> tuple[list[_Example], list[_Example]]:
    """Split into (train, eval) by `held_out`."""
    chosen = held_out((example.content for example in examples), fraction)
    train = [example for example in examples if example.content not in chosen]
    return train, [example for example in examples if example.content in chosen]


async def prepare_in_child(wanted: Preparation) -> Prepared:
    """Run `prepare` in a process of its own. Same result and errors, and TrainingError when that process dies.

    Cancelling the call ends the process.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "client.data.prepare",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    try:
        out, _ = await process.communicate(_PREPARATION.dump_json(wanted))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise TrainingError(
            f"{wanted.data}: the process that prepares the data ended with status {process.returncode}; a negative one "
            "is a signal, -9 mostly means that memory ran out: split the file or add memory"
        )
    answer = json.loads(out)
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        raise kind(answer["message"])
    train, held_out = Path(answer.pop("train")), Path(answer.pop("eval"))
    files = {name: Path(file) for name, file in answer.pop("guards").items()}
    return Prepared(train, held_out, **answer, guards=files)


def _answer(order: bytes) -> dict[str, Any]:
    wanted = _PREPARATION.validate_json(order)
    try:
        prepared = prepare(wanted)
    except UmbelError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # its message may quote an example, so only its type and place are reported
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{wanted.data}: preparing failed with {type(error).__name__} at {place.filename}:{place.lineno}"
        return {"error": TrainingError.__name__, "message": message}
    return vars(prepared)


def main() -> None:
    """Run the child process: read an order from stdin, write its answer to stdout."""
    os.nice(10)  # users come first
    with contextlib.redirect_stdout(sys.stderr):
        answer = _answer(sys.stdin.buffer.read())
    json.dump(answer, sys.stdout, default=str)  # paths


if __name__ == "__main__":
    main()
