"""`prepare`: turn a site's JSONL into token files with loss on the answers only, by the base's chat template.

    data.jsonl ──read──► turns ──chat template──► (ids, labels) ──sides──► train.npy, eval.npy
    each guard ──the same, without a split──► guard-NAME.npy

Tokenising takes minutes, so the daemon awaits `prepare_in_child`; the same inputs are never prepared twice. No message
of this module holds text of an example: a message names the line and the expected shape.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from client.data.chat_tokens import ChatTokenizer
from client.data.sides import clusters, digest, sides
from client.data.summary import DATA, EVAL_DATA, HELD_OUT, RELEASED, Asked, Summary, guard_name
from client.data.survey import survey
from client.worth.row_keys import KEYS
from umbel import errors, token_file
from umbel.errors import ConfigError, DataError, TrainingError, UmbelError

TRAIN, EVAL, COUNTS = "train.npy", "eval.npy", "counts.json"
FORMAT = 4
"""Version of the token files, part of every cache key; raise it when the same inputs shall give other files."""


@dataclass(frozen=True)
class Prepared:
    """A site's token files and what went into them."""

    train: Path
    eval: Path
    train_examples: int
    eval_examples: int
    train_loss_tokens: int
    guards: dict[str, Path] = field(default_factory=dict)
    """Name of a guard → its token file."""
    held: dict[str, int] = field(default_factory=dict)
    """`held_examples` and `held_loss_tokens` of a `RoundReport`: what is trained on, each content once."""
    files: dict[str, Summary] = field(default_factory=dict)
    """Figures about each file of examples, by its name in sentences (`client.data.summary`)."""
    asked: dict[str, Asked] = field(default_factory=dict)
    """How much each set tells that versions are compared on: HELD_OUT, and guards by their names in sentences."""
    withheld: dict[str, int] = field(default_factory=dict)
    """Name of a file in sentences → its examples that are not trained on, because what they ask is held out or in a
    guard."""
    clusters: dict[str, list[int]] = field(default_factory=dict)
    """Stem of a token file, such as `eval` → for each of its rows the number of its group: those of a group ask the
    same. In a file that is not here each row is alone."""
    heldout: str = ""
    """Digest of what the held-out examples ask. Verdicts are counted by it."""
    tokenizer: str = ""
    """Digest of the files of the base that the tokens were made with."""
    domains: tuple[str, ...] = ()
    """Digest of the name of each domain of the training rows, by its number in their keys."""

    @property
    def folder(self) -> Path:
        """The directory of the token files, under a name that no other content has."""
        return self.train.parent

    @property
    def keys(self) -> Path:
        """The keys of the training rows (`client.worth.row_keys`)."""
        return self.train.with_name(KEYS)

    @property
    def cut(self) -> int:
        """Examples that are longer than seq_len and lose their end."""
        return sum(summary.cut for summary in self.files.values())

    @property
    def dropped(self) -> int:
        """Examples that are left out: no token of an answer is left in them, or a user gave what cannot be used."""
        return sum(summary.dropped + summary.refused for summary in self.files.values())

    @property
    def untold(self) -> int:
        """Answers without a loss, because nothing comes before them."""
        return sum(summary.untold for summary in self.files.values())


@dataclass(frozen=True)
class Preparation:
    """The files, the base and the settings that token files are made from."""

    data: Path
    eval_data: Path | None
    """Held-out examples; None: about `eval_fraction` of the groups of examples of `data` are held out."""
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
    keep: tuple[str, ...] = ()
    """Names of the directories of `into` that are in use, and stay."""
    tokenizer: str = ""
    """Digest that the base's tokenizer must have, because the engine was started with it; empty: any."""


_PREPARATION = TypeAdapter(Preparation)
_PREPARED = TypeAdapter(Prepared)


def prepare(wanted: Preparation) -> Prepared:
    """Tokenise a site's data into a directory of `into`, unless the same inputs are there already.

    Held out of `data` are always the same examples, also after lines were added. Data and released examples are trained
    on unless one that is held out or in a guard asks the same. One preparation at a time per `into`; the files of other
    inputs are removed, except those to `keep`. Raises DataError naming file and line, ConfigError when the base's
    tokenizer cannot be used, or is not the one that is wanted.
    """
    tokenizer = _digest_tokenizer(wanted.model)
    if wanted.tokenizer not in ("", tokenizer):
        raise ConfigError(
            f"{wanted.model}: tokenizer or chat template are not those that the engine was started with; restart "
            "`umbel serve`, or bring the old files back"
        )
    inputs = _digest(wanted, tokenizer)
    directory = wanted.into / inputs
    _remove_superseded(wanted.into, {inputs, *wanted.keep})
    if not directory.is_dir():
        temporary = wanted.into / f".{directory.name}.tmp"
        temporary.mkdir(parents=True, mode=0o700)
        try:
            prepared = _write(wanted, ChatTokenizer.load(wanted.model), temporary)
            (temporary / COUNTS).write_bytes(_PREPARED.dump_json(prepared))
        except BaseException:  # no half of a private text stays behind
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if _digest(wanted, _digest_tokenizer(wanted.model)) != inputs:
            # Changed while it was read: these tokens are of no file that will be found again.
            directory = wanted.into / secrets.token_hex(32)
        os.rename(temporary, directory)
    prepared = _PREPARED.validate_json((directory / COUNTS).read_bytes())
    guards = {name: directory / file.name for name, file in prepared.guards.items()}
    return replace(prepared, train=directory / TRAIN, eval=directory / EVAL, guards=guards, tokenizer=tokenizer)


def _remove_superseded(into: Path, keep: Collection[str]) -> None:
    """Remove the token files of other inputs, so that private text does not pile up in forgotten copies."""
    for old in into.glob("*") if into.is_dir() else ():
        if old.name not in keep and re.fullmatch(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.tmp", old.name):
            shutil.rmtree(old)


def forget_others(data: Path, adapters: Collection[str]) -> None:
    """Remove the token files of adapters that are not among `adapters`, and those that no adapter's folder holds."""
    for old in data.iterdir() if data.is_dir() else ():
        if old.name not in adapters and old.is_dir():
            shutil.rmtree(old)


def _digest(wanted: Preparation, tokenizer: str) -> str:
    """Return the sha256 of all that decides the content of the token files; `tokenizer` is that of its files."""
    parts: list[object] = [FORMAT, metadata.version("transformers"), metadata.version("sglang"), wanted.seq_len]
    parts += [(name, _digest_file(file)) for name, file in sorted(_files(wanted).items())]
    parts += [] if wanted.eval_data else [wanted.eval_fraction]
    parts.append(tokenizer)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest_tokenizer(model: Path) -> str:
    """Return the sha256 of a tokenizer's files, which may have any name, without the weights."""
    files = sorted((*model.glob("*"), *model.glob("additional_chat_templates/*")))
    parts = [(file.name, _digest_file(file)) for file in files if file.suffix in (".json", ".jinja", ".model", ".txt")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _files(wanted: Preparation) -> dict[str, Path]:
    """Return all files of examples by their names in sentences."""
    files = {DATA: wanted.data} | ({EVAL_DATA: wanted.eval_data} if wanted.eval_data else {})
    files |= {guard_name(name): file for name, file in wanted.guards.items()}
    return files | ({RELEASED: wanted.released} if wanted.released else {})


def _digest_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); see the site file") from error


def _write(wanted: Preparation, tokenizer: ChatTokenizer, into: Path) -> Prepared:
    """Write all token files into a directory; return what is there."""
    surveys = {name: survey(file, tokenizer, wanted.seq_len) for name, file in _files(wanted).items()}
    for name, surveyed in surveys.items():
        # What a user gave stops no site: some chat templates have no form for it, such as two turns of the same role.
        for mistake in surveyed.mistakes() if name != RELEASED else ():
            raise mistake
    split = sides(
        {name: surveyed.examples for name, surveyed in surveys.items()},
        None if wanted.eval_data else wanted.eval_fraction,
    )
    if (nothing_left := split.mistake(wanted.data)) is not None:
        raise nothing_left
    # One row, no packing: attention is causal and nothing else masks it, so that an example packed behind another
    # would read it.
    distinct = {example.content: example.loss_tokens for example in split.train}
    asking = {EVAL: split.asking[HELD_OUT]}
    asking |= {f"guard-{name}.npy": split.asking[guard_name(name)] for name in wanted.guards}
    for file, examples in {TRAIN: split.train, **asking}.items():
        rows = [row for example in examples for row in example.rows]
        token_file.write(into / file, rows, seq_len=wanted.seq_len, pad_id=tokenizer.pad_id)
    keys, domains = split.keys()
    keys.write(into / KEYS)
    return Prepared(
        train=into / TRAIN,
        eval=into / EVAL,
        train_examples=len(split.train),
        eval_examples=len(split.asking[HELD_OUT]),
        train_loss_tokens=sum(example.loss_tokens for example in split.train),
        guards={name: into / f"guard-{name}.npy" for name in wanted.guards},
        held={"held_examples": len(distinct), "held_loss_tokens": sum(distinct.values())},
        files={name: surveyed.summary for name, surveyed in surveys.items()},
        asked=split.asked,
        withheld=split.withheld,
        clusters={Path(file).stem: clusters(examples) for file, examples in asking.items()},
        heldout=digest(split.asking[HELD_OUT]),
        domains=domains,
    )


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
    return _PREPARED.validate_python(answer)


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
    return dict(_PREPARED.dump_python(prepared, mode="json"))


def main() -> None:
    """Run the child process: read an order from stdin, write its answer to stdout."""
    os.nice(10)  # users come first
    with contextlib.suppress(OSError):  # also where memory runs out: this ends before the engine does
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.redirect_stdout(sys.stderr):
        answer = _answer(sys.stdin.buffer.read())
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
