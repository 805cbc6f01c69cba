"""`sides`: which examples of a site are trained on, and which only ask: those held out, and those of guards.

What asks is never trained on, in no wording that differs only in case, white space or Unicode form, and in no longer or
shorter piece of the same conversation: else a verdict would measure what was learnt by heart.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.data.examples import held_out
from client.data.inspection import Inspected
from client.data.summary import DATA, EVAL_DATA, GROUP_REMEDY, HELD_OUT, RELEASED, Asked
from client.worth.row_keys import RowKeys
from serving.scores import effective_size
from umbel.errors import DataError


@dataclass(frozen=True)
class Sides:
    """All usable examples of a site."""

    train: list[Inspected]
    source: list[str]
    """Name of the file that each of `train` is from."""
    asking: dict[str, list[Inspected]]
    """HELD_OUT, and the name of each guard's file in sentences → its examples, each content once."""
    withheld: dict[str, int]
    """Name of a file → its examples that are not trained on, because one that is held out or in a guard asks the same;
    files without any are left out."""

    def keys(self) -> tuple[RowKeys, tuple[str, ...]]:
        """Return the keys of the training rows, and the digest of each domain's name: an example's, or its file's."""
        numbers: dict[str, int] = {}
        rows = []
        for example, file in zip(self.train, self.source, strict=True):
            name = f"file {file}" if example.domain is None else f"domain {example.domain}"
            number = numbers.setdefault(hashlib.sha256(name.encode()).hexdigest()[:16], len(numbers))
            rows += [(example.content, example.group, number) for _ in example.rows]
        return RowKeys.of(rows), tuple(numbers)

    @property
    def asked(self) -> dict[str, Asked]:
        """What each set tells."""
        groups = {name: {example.group for example in examples} for name, examples in self.asking.items()}
        return {
            name: Asked(len(examples), counts_as(examples), _twin(name, groups))
            for name, examples in self.asking.items()
        }

    def mistake(self, path: object) -> DataError | None:
        """Return what keeps the site from training, blamed on its file of data; None where something is left."""
        if self.train or not self.withheld.get(DATA):
            return None
        return DataError(
            f"{path}: no example is left to train on: held-out examples or guards ask the same as all "
            f"{self.withheld[DATA]:,}; give other eval_data and guards or, {GROUP_REMEDY}"
        )


def sides(files: Mapping[str, Sequence[Inspected]], fraction: float | None) -> Sides:
    """Put the usable examples of each file, by its name in sentences, on their sides.

    `fraction` is the share of the data that is held out, by groups; None for a site with held-out examples of its own.
    """
    data, released = files.get(DATA, ()), files.get(RELEASED, ())
    asking = {HELD_OUT: files.get(EVAL_DATA, ())} | {
        name: examples for name, examples in files.items() if name not in (DATA, EVAL_DATA, RELEASED)
    }
    if fraction is not None:
        chosen = held_out((example.group for example in data), fraction)
        asking[HELD_OUT] = [example for example in data if example.group in chosen]
        data = [example for example in data if example.group not in chosen]
    known = {key for examples in asking.values() for example in examples for key in (example.group, example.content)}
    train: list[Inspected] = []
    source: list[str] = []
    withheld: dict[str, int] = {}
    for name, examples in ((DATA, data), (RELEASED, released)):
        left = [example for example in examples if example.group not in known and example.content not in known]
        withheld |= {name: len(examples) - len(left)} if len(left) < len(examples) else {}
        train += left
        source += [name] * len(left)
    return Sides(train, source, {name: _once(examples) for name, examples in asking.items()}, withheld)


def _twin(name: str, groups: Mapping[str, set[str]]) -> str:
    """Return the first of the other sets that asks all that this guard asks, of equal ones only an earlier one."""
    names, own = list(groups), groups[name]
    for place, other in enumerate(names if name != HELD_OUT and own else ()):
        if own < groups[other] or (own == groups[other] and place < names.index(name)):
            return other
    return ""


def _once(examples: Sequence[Inspected]) -> list[Inspected]:
    """Keep each content once, where it comes first."""
    return list({example.content: example for example in reversed(examples)}.values())[::-1]


def clusters(examples: Sequence[Inspected]) -> list[int]:
    """Return for each row of a token file of these examples the number of its group."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(example.group, len(numbers)) for example in examples for _ in example.rows]


def counts_as(examples: Sequence[Inspected]) -> float:
    """Return how many independent examples of equal length tell as much about a loss per token."""
    tokens: Counter[str] = Counter()
    for example in examples:
        tokens[example.group] += example.loss_tokens
    return effective_size(list(tokens.values()))


def digest(examples: Sequence[Inspected]) -> str:
    """Return the sha256 of what a set of examples asks, whatever their order and answers."""
    return hashlib.sha256(json.dumps(sorted({example.group for example in examples})).encode()).hexdigest()
