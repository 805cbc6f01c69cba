"""`Survey`: a whole file of examples, inspected and added up: the usable ones, the refused ones, the figures.

`AdapterSurvey`: the same for all files of an adapter, as `umbel check` tells it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from client.data.chat_tokens import ChatTokenizer
from client.data.inspection import Inspected, Kind, inspect, loss_tokens
from client.data.shapes import EXPECTED
from client.data.sides import Sides, sides
from client.data.summary import DATA, EVAL_DATA, RELEASED, Summary, files_of, quantile
from umbel.errors import DataError
from umbel.site.config import SiteConfig
from umbel.token_file import NO_LOSS

SHOWN_REFUSALS = 3
"""Refused examples that an error names one by one."""


class Tally:
    """Adds up the examples of one file.

    >>> tally = Tally(tokenizer)
    >>> for example in inspect(path, tokenizer, 512):
    ...     tally.add(example)
    >>> tally.summary()
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._stops = tokenizer.stops
        self._counts = dict.fromkeys(("examples", "refused", "cut", "dropped", "untold", "repeated", "unending"), 0)
        self._seen: set[str] = set()
        self._groups: Counter[str] = Counter()
        self._lengths: list[int] = []
        self._loss_tokens = self._filled = self._room = 0

    def add(self, example: Inspected) -> None:
        """Count one example."""
        counts = self._counts
        counts["examples"] += 1
        if example.refused is not None:
            counts["refused"] += 1
            return
        rows = example.rows
        counts["cut"] += example.cut
        counts["dropped"] += example.dropped
        counts["untold"] += example.untold
        counts["repeated"] += example.content in self._seen
        counts["unending"] += self._unending(example)
        self._groups[example.group] += example.content not in self._seen
        self._seen.add(example.content)
        self._lengths.append(example.tokens)
        self._loss_tokens += sum(map(loss_tokens, rows))
        self._filled += sum(len(ids) for ids, _ in rows)
        self._room += example.seq_len * len(rows)

    def summary(self) -> Summary:
        """Return the figures about all examples so far."""
        lengths = sorted(self._lengths)
        return Summary(
            **self._counts,
            groups=len(self._groups),
            largest_group=max(self._groups.values(), default=0),
            loss_tokens=self._loss_tokens,
            median=quantile(lengths, 0.5),
            p95=quantile(lengths, 0.95),
            longest=quantile(lengths, 1),
            padding=1 - self._filled / self._room if self._room else 0.0,
        )

    def _unending(self, example: Inspected) -> bool:
        """Tell whether the last token with a loss, before cutting, is none at which the engine stops."""
        ids, labels = example.whole[-1] if example.whole else ((), ())
        last = next(
            (token for token, label in zip(reversed(ids), reversed(labels), strict=True) if label != NO_LOSS), None
        )
        return last is not None and last not in self._stops


@dataclass(frozen=True)
class Survey:
    """A whole file."""

    path: Path
    examples: list[Inspected]
    """The examples that training or a probe can use."""
    refused: list[DataError]
    """The reasons of the first `SHOWN_REFUSALS` examples that are refused."""
    summary: Summary

    @property
    def pairs(self) -> bool:
        """Say whether its examples are pairs of answers."""
        return any(example.pair for example in self.examples)

    def mistakes(self) -> list[DataError]:
        """Return what keeps the file from being used: examples that are refused, or nothing to train on."""
        summary = self.summary
        if self.refused:
            return self.refused
        if not summary.examples:
            return [DataError(f"{self.path}: holds no example; {EXPECTED}, one per line")]
        if self.examples:
            return []
        total, cut = summary.examples, summary.cut  # what is left out was cut
        return [
            DataError(
                f"{self.path}: no trainable token in any of {total} examples: {cut} of {total} prompts fill seq_len "
                "before their answer begins; raise [training].seq_len"
            )
        ]


def kind_of(name: str, read: Mapping[str, Survey]) -> Kind:
    """Say of which kind the examples of a file must be, by its name in sentences, once others are read.

    Held-out examples are those of the data. A pair that a user gave also tells which answer to learn. Guards are of
    their own kind.
    """
    data = read.get(DATA)
    if data is None or not data.examples or name not in (EVAL_DATA, RELEASED):
        return None
    return "pairs" if data.pairs else "answers" if name == EVAL_DATA else "answers or chosen"


def survey(path: Path, tokenizer: ChatTokenizer, seq_len: int, kind: Kind = None) -> Survey:
    """Inspect a whole file. Raises DataError where the file as a whole cannot be read."""
    tally = Tally(tokenizer)
    usable: list[Inspected] = []
    refused: list[DataError] = []
    for example in inspect(path, tokenizer, seq_len, kind):
        tally.add(example)
        if example.refused is None and not example.dropped:
            usable.append(example)
        elif example.refused is not None and len(refused) < SHOWN_REFUSALS:
            refused.append(example.refused)
    return Survey(path, usable, refused, tally.summary())


@dataclass(frozen=True)
class AdapterSurvey:
    """All files of an adapter."""

    files: dict[str, Survey]
    """Name in sentences (`files_of`) → a file that can be read."""
    mistakes: dict[str, list[DataError]]
    """Name → what keeps the file from being used."""
    sides: Sides
    """The usable examples of all files that can be read."""


def survey_adapter(config: SiteConfig, adapter: str, tokenizer: ChatTokenizer) -> AdapterSurvey:
    """Inspect all files of an adapter, and put their examples on the sides of the split."""
    files: dict[str, Survey] = {}
    mistakes: dict[str, list[DataError]] = {}
    for name, path in files_of(config, adapter).items():
        try:
            files[name] = survey(path, tokenizer, config.training.seq_len, kind_of(name, files))
            found = files[name].mistakes()
        except DataError as error:
            found = [error]
        mistakes |= {name: found} if found else {}
    held_out = None if config.eval_data(adapter) else config.training.eval_fraction
    split = sides({name: found.examples for name, found in files.items()}, held_out)
    if DATA in files and (mistake := split.mistake(files[DATA].path)) is not None:
        mistakes[DATA] = [*mistakes.get(DATA, []), mistake]
    return AdapterSurvey(files, mistakes, split)
