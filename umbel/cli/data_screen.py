"""`show`: a file of examples for people: its figures, what is refused and why, and the first examples as trained on.

In colours on a terminal, plain elsewhere. Control characters of the texts are escaped, so that none drives a terminal.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from client.data.chat_tokens import ChatTokenizer
from client.data.inspection import Inspected, Stretch, stretches
from client.data.sides import sides
from client.data.summary import DATA, EVAL_DATA, HELD_OUT, Summary, files_of, warnings
from client.data.survey import Tally, survey
from umbel.cli.status_screen import Row, grid
from umbel.errors import DataError
from umbel.printable import escaped
from umbel.site.config import SiteConfig

SHOWN_EXAMPLES = 3
SHOWN_REASONS = 20
SHOWN_RANGES = 12
"""Ranges of lines that are named for one reason."""
LONG = 600
"""Characters of a stretch from which on its middle is left out, unless one line is asked for."""
LOSS, CUT = ("⟦", "⟧"), ("⟪", "⟫")
MARKS = (*LOSS, *CUT)
LEGEND = "⟦…⟧ carries a loss; what is outside is read, and not learnt"
LEGEND_CUT = "; ⟪…⟫ is behind seq_len, and left out"


def show(
    examples: Iterable[Inspected],
    tokenizer: ChatTokenizer,
    path: Path,
    config: SiteConfig,
    adapter: str,
    console: Console | None = None,
) -> bool:
    """Print a whole file as an adapter would be trained on it; return whether an example is refused."""
    console = console or Console(highlight=False)
    tally = Tally(tokenizer)
    first: list[Inspected] = []
    usable: list[Inspected] = []
    reasons: dict[str, list[int]] = {}
    for example in examples:
        tally.add(example)
        why = example.reason(path)
        if why is not None:
            reasons.setdefault(why, []).append(example.number)
            continue
        if not example.dropped:
            usable.append(example)
        if len(first) < SHOWN_EXAMPLES:
            first.append(example)
    console.print(Text.assemble((str(path), "bold"), f": base {config.model.served_name} at {config.model.path}"))
    console.print(grid(_rows(tally.summary(), usable, path, config, adapter, tokenizer)))
    if reasons:
        console.print()
        console.print(grid(_refusals(reasons)))
    for example in first:
        console.print()
        _show(console, example, tokenizer, LONG)
    _legend(console, first)
    return bool(reasons)


def show_one(example: Inspected, tokenizer: ChatTokenizer, path: Path, console: Console | None = None) -> bool:
    """Print one example in full, with its tokens; return whether it is refused."""
    console = console or Console(highlight=False)
    if (why := example.reason(path)) is not None:
        console.print(Text.assemble(f"line {example.number}: ", ("refused", "bold red"), f": {escaped(why)}"))
        return True
    _show(console, example, tokenizer, None)
    _legend(console, [example])
    for number, row in enumerate(example.whole, start=1):
        of = f"   row {number}" if len(example.whole) > 1 else ""
        console.print(f"\n  place      id        token{of}")
        for stretch in stretches(row, tokenizer, example.seq_len):
            for place, token in enumerate(stretch.ids, start=stretch.first):
                text = json.dumps(tokenizer.tokenizer.decode([token]), ensure_ascii=False)
                line = f"  {place:>5}  {token:>6}  {'loss' if stretch.loss else 'cut' if stretch.cut else '':4}  "
                console.print(Text.assemble(line, (escaped(text, also=MARKS), _style(stretch))), soft_wrap=True)
    return False


def _rows(
    summary: Summary,
    usable: list[Inspected],
    path: Path,
    config: SiteConfig,
    adapter: str,
    tokenizer: ChatTokenizer,
) -> Iterator[Row]:
    """Yield the rows of a file's figures."""
    seq_len = config.training.seq_len
    taken = {"refused": summary.refused, "left out": summary.dropped, f"cut at seq_len = {seq_len}": summary.cut}
    yield "examples", Text(", ".join([f"{summary.examples:,}", *(f"{n:,} {what}" for what, n in taken.items() if n)]))
    if summary.refused == summary.examples:
        return
    lengths = f"half have at most {summary.median:,}, 95 % at most {summary.p95:,}, the longest {summary.longest:,}"
    yield "tokens", Text(f"{lengths}; {summary.padding:.0%} padding at seq_len = {seq_len}")
    untold = f"; {_answers(summary.untold)} without one: nothing comes before" if summary.untold else ""
    yield "loss", Text(f"on {summary.loss_tokens:,} tokens{untold}")
    if summary.groups < summary.usable:
        largest = f"the largest has {summary.largest_group:,} different examples"
        yield "groups", Text(f'{summary.groups:,} by first user turn, or by "group"; {largest}')
    name = _name(path, config, adapter)
    known, unread = _asking(config, adapter, tokenizer) if name == DATA else ({}, [])
    split = sides({**known, name: usable}, None if config.eval_data(adapter) else config.training.eval_fraction)
    if name == DATA:
        parts = [f"{len(split.train):,} to train on, {len(split.asking[HELD_OUT]):,} held out"]
        parts += [f"{n:,} withheld: held-out examples or guards ask the same" for n in split.withheld.values()]
        parts += [f"{other} cannot be read, so what it withholds is not counted" for other in unread]
        yield "split", Text("; ".join(parts))
    told = HELD_OUT if name in (DATA, EVAL_DATA) else name if name in files_of(config, adapter) else None
    asked = {asking: found for asking, found in split.asked.items() if asking == told and EVAL_DATA not in unread}
    for sentence in warnings(config, adapter, {name: summary}, asked, split.withheld):
        yield "will bite", Text(sentence, "yellow")


def _asking(config: SiteConfig, adapter: str, tokenizer: ChatTokenizer) -> tuple[dict[str, list[Inspected]], list[str]]:
    """Return the usable examples of held-out files and guards, and the names of those that cannot be read."""
    known: dict[str, list[Inspected]] = {}
    unread = []
    for name, path in files_of(config, adapter).items():
        try:
            known |= {name: survey(path, tokenizer, config.training.seq_len).examples} if name != DATA else {}
        except (OSError, DataError):  # `umbel check` says why; this file can be shown all the same
            unread.append(name)
    return known, unread


def _answers(number: int) -> str:
    return f"{number:,} answer{'s' if number != 1 else ''}"


def _name(path: Path, config: SiteConfig, adapter: str) -> str:
    """Return the name of a file in sentences: the setting that names it, if one does."""
    known = {file.resolve(): name for name, file in reversed(files_of(config, adapter).items())}
    return known.get(path.resolve(), str(path))


def _refusals(reasons: dict[str, list[int]]) -> Iterator[Row]:
    """Yield one row for each reason, with the lines that are refused for it."""
    for reason, numbers in itertools.islice(reasons.items(), SHOWN_REASONS):
        ranges = list(_ranges(numbers))
        more = f" and {len(ranges) - SHOWN_RANGES} ranges more" if len(ranges) > SHOWN_RANGES else ""
        lines = f"line{'s' if len(numbers) > 1 else ''} {', '.join(ranges[:SHOWN_RANGES])}{more}"
        yield "refused", Text.assemble((lines, "bold red"), f": {escaped(reason)}")
    if len(reasons) > SHOWN_REASONS:
        left = sum(map(len, itertools.islice(reasons.values(), SHOWN_REASONS, None)))
        yield "refused", Text(f"{left:,} lines more, for other reasons; --json names each")


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Yield ascending numbers as ranges: 1-3, 7."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"


def _show(console: Console, example: Inspected, tokenizer: ChatTokenizer, long: int | None) -> None:
    """Print an example's rows as text, with marks around what carries a loss."""
    parts = [f"{example.tokens:,} tokens", f"{example.loss_tokens:,} with a loss"]
    parts += [f"{_answers(example.untold)} without one: nothing comes before"] if example.untold else []
    parts += [f"{len(example.whole)} rows"] if len(example.whole) > 1 and not example.pair else []
    parts += ["the chosen answer, then the rejected one"] if example.pair else []
    parts += ["left out"] if example.dropped else ["cut"] if example.cut else []
    console.print(Text.assemble((f"line {example.number}", "bold"), f": {', '.join(parts)}"))
    for row in example.whole:
        text = Text("  ")
        for stretch in stretches(row, tokenizer, example.seq_len):
            before, after = LOSS if stretch.loss else CUT if stretch.cut else ("", "")
            told = escaped(_shortened(stretch.text, long), also=MARKS).replace("\n", "↵\n  ")
            text.append(f"{before}{told}{after}", _style(stretch))
        console.print(text, soft_wrap=True)


def _legend(console: Console, shown: list[Inspected]) -> None:
    if shown:
        more = LEGEND_CUT if any(example.cut for example in shown) else ""
        console.print(f"\n{LEGEND}{more}", soft_wrap=True)


def _style(stretch: Stretch) -> str:
    return "bold green" if stretch.loss else "dim strike" if stretch.cut else ""


def _shortened(text: str, long: int | None) -> str:
    if long is None or len(text) <= long:
        return text
    half = long // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
