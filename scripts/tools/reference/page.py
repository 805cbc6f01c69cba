"""Parts that every generated page of docs/reference/ shares: its first lines, its tables, its single-line cells."""

from collections.abc import Iterable, Sequence

from scripts.tools.repository import REPOSITORY

FOLDER = REPOSITORY / "docs" / "reference"


def head(title: str, source: str) -> str:
    """Begin a page; `source` names the code that it is made from."""
    return f"# {title}\n\n*Made by `scripts/reference` from {source}; a test holds it up to date.*\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table, with a line break at its end."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        "|" + "|".join(f" {cell(text)} " if text != "---" else text for text in line) + "|\n" for line in lines
    )


def cell(text: str) -> str:
    """Put a text on one line, with every `|` escaped: it would begin the next cell."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: object) -> str:
    """Set a value in code type; nothing for an empty text."""
    return f"`{text}`" if str(text) else ""
