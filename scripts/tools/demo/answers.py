"""`side_by_side`: held-out questions that each site answers before and after, with the base and with the adapter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.tools.demo.users import Users


def questions(heldout: Path, count: int) -> list[tuple[str, str]]:
    """Return `count` (question, right answer) of a file of `messages`, evenly spread over it; all if it has fewer."""
    turns = [json.loads(line)["messages"] for line in heldout.read_text(encoding="utf-8").splitlines()]
    count = min(count, len(turns))
    chosen = [turns[index * (len(turns) - 1) // max(1, count - 1)] for index in range(count)]
    return [(asked["content"], answer["content"]) for asked, answer in chosen]


def side_by_side(users: Users, base: str, asked: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Ask a site's base and its adapter the same questions, greedily; a request that fails counts among its users'.

    Each row has `question`, `right`, `base`, `adapter`, and `version`, who answered as the adapter.
    """
    rows = []
    for question, right in asked:
        before, _ = users.ask_once(base, question)
        after, version = users.ask_once(users.model, question)
        rows.append({"question": question, "right": right, "base": before, "adapter": after, "version": version})
    return rows


def show_answers(answers: Mapping[str, Sequence[Mapping[str, str]]], console: Console) -> None:
    """Print the answers before and after of each site; nothing where nothing was asked."""
    for site, rows in answers.items():
        table = Table(title=f"{site}: held-out questions, before and after", show_lines=True)
        versions = sorted({row["version"] for row in rows})
        for column in ("question", "right answer", "the base", ", ".join(versions)):
            table.add_column(column)
        for row in rows:
            said = (Text(row[who], "green" if row[who] == row["right"] else "red") for who in ("base", "adapter"))
            table.add_row(row["question"], row["right"], *said)
        console.print(table)
        console.print(
            f"Right at {site}: {_right(rows, 'base')} of {len(rows)} before, {_right(rows, 'adapter')} after."
        )
    if answers:
        console.print("These facts are invented: what a real site trains on is in no report, and in no log.")


def no_better(answers: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """Return a line for each site whose adapter has not answered more questions rightly than its base."""
    return [
        f"{site}: the adapter answers {_right(rows, 'adapter')} of {len(rows)} questions rightly, "
        f"the base {_right(rows, 'base')}"
        for site, rows in answers.items()
        if _right(rows, "adapter") <= _right(rows, "base")
    ]


def _right(rows: Sequence[Mapping[str, str]], who: str) -> int:
    return sum(row[who] == row["right"] for row in rows)
