"""`inspect`: each example of a file as it would be trained on: its tokens, what carries a loss, what seq_len takes.

    for example in inspect(path, tokenizer, seq_len=512):
        print(example.number, example.tokens, example.refused or trained(example, tokenizer))

Only `umbel data` shows the texts; they are private.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from client.data.chat_tokens import ChatTokenizer
from client.data.conversation import content_of, group_of
from client.data.examples import lines
from umbel.errors import DataError
from umbel.token_file import NO_LOSS, LabelledTokens


@dataclass(frozen=True)
class Inspected:
    """One example of a file."""

    number: int
    """Number of its line, or of the item in a JSON array; from 1 on."""
    refused: DataError | None
    """The reason for which it cannot be used."""
    content: str
    """`content_of` its conversation; empty where it is refused."""
    group: str
    """`group_of` its conversation; empty where it is refused."""
    whole: tuple[LabelledTokens, ...]
    """Its rows before seq_len cuts them; ordinarily one. Empty where it is refused."""
    untold: int
    """Answers without a loss, because nothing comes before them."""
    seq_len: int
    domain: str | None = None
    """The part of the data that it says it belongs to."""

    @property
    def rows(self) -> list[LabelledTokens]:
        """The rows that are trained on: cut at seq_len, and those without a loss left out."""
        cut = [(ids[: self.seq_len], labels[: self.seq_len]) for ids, labels in self.whole]
        return [row for row in cut if loss_tokens(row)]

    @property
    def tokens(self) -> int:
        """Length of the longest row before cutting."""
        return max((len(ids) for ids, _ in self.whole), default=0)

    @property
    def cut(self) -> bool:
        """Say whether seq_len takes a part of it."""
        return self.tokens > self.seq_len

    @property
    def dropped(self) -> bool:
        """Say whether seq_len leaves nothing with a loss of it, so that it is left out."""
        return self.refused is None and not self.rows

    @property
    def loss_tokens(self) -> int:
        """Count the tokens with a loss that are left."""
        return sum(map(loss_tokens, self.rows))

    def reason(self, path: Path) -> str | None:
        """Return why it is refused, without its place in the file `path`."""
        return str(self.refused).removeprefix(f"{path}:{self.number}: ") if self.refused else None


def inspect(path: Path, tokenizer: ChatTokenizer, seq_len: int) -> Iterator[Inspected]:
    """Yield every example of a file, refused ones included.

    Raises DataError where the file as a whole cannot be read.
    """
    for line in lines(path):
        refused = line.refused
        if line.conversation is not None:
            try:
                encoded = tokenizer.encode(line.conversation, f"{path}:{line.number}")
            except DataError as error:
                refused = error
            else:
                content, group = content_of(line.conversation), group_of(line.conversation)
                yield Inspected(
                    line.number, None, content, group, tuple(encoded.rows), encoded.untold, seq_len,
                    line.conversation.domain,
                )  # fmt: skip
                continue
        yield Inspected(line.number, refused, "", "", (), 0, seq_len)


def loss_tokens(row: LabelledTokens) -> int:
    """Count the tokens of a row that carry a loss."""
    return sum(label != NO_LOSS for label in row[1])


@dataclass(frozen=True)
class Stretch:
    """A part of a row in which every token carries a loss, or none does."""

    first: int
    """Place of its first token in the row."""
    ids: tuple[int, ...]
    text: str
    """Its tokens decoded, special ones visible."""
    loss: bool
    cut: bool
    """True behind seq_len; then it carries no loss."""


def stretches(row: LabelledTokens, tokenizer: ChatTokenizer, seq_len: int) -> list[Stretch]:
    """Return a whole row as stretches, in order; one that seq_len cuts is two."""
    ids, labels = row
    places = [(place < seq_len and label != NO_LOSS, place >= seq_len) for place, label in enumerate(labels)]
    borders = [place for place in range(1, len(ids)) if places[place] != places[place - 1]]
    found, before = [], ""
    for first, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        # Some tokenizers write a space only between words, so a stretch is decoded behind what comes before it.
        upto, part = tokenizer.decode(ids[:end]), tuple(ids[first:end])
        text = upto.removeprefix(before) if upto.startswith(before) else tokenizer.decode(part)
        found.append(Stretch(first, part, text, *places[first]))
        before = upto
    return found if ids else []


def trained(example: Inspected, tokenizer: ChatTokenizer) -> list[str]:
    """Return the decoded stretches that carry a loss, in order, over all rows."""
    return [
        stretch.text for row in example.whole for stretch in stretches(row, tokenizer, example.seq_len) if stretch.loss
    ]


def prompt(example: Inspected, tokenizer: ChatTokenizer) -> str | None:
    """Return the text before the first answer that carries a loss; None for an example that is refused."""
    for ids, labels in example.whole:
        first = next((place for place, label in enumerate(labels) if label != NO_LOSS), None)
        if first is not None:
            return tokenizer.decode(ids[:first])
    return None if example.refused else ""
