"""`write`: puts the deaths of scripts/tools/kill/matrix.py into a table of docs/operations.md."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from umbel.peft_dir import replace_durably

BEGIN, END = "<!-- kill matrix: begin -->", "<!-- kill matrix: end -->"
KILLED = ("ServerApp", "site", "engine")


@dataclass(frozen=True)
class Row:
    """One death, and whether all was well afterwards."""

    point: str
    killed: str
    recovered: bool
    """The right version answered the user, and the interrupted operation was completed."""
    silence_s: float
    """Longest time between two answers to the user."""
    answers: str = ""
    """The version that answered the user afterwards."""

    def __str__(self) -> str:
        how = "recovered" if self.recovered else "NOT RECOVERED"
        return f"{self.killed} killed at {self.point}: {how}, {self.answers} answers; {self.silence_s:.1f} s of silence"


def write(page: Path, rows: list[Row], cases: int) -> None:
    """Put the table between the page's markers; the rows of deaths that were not tried this time stay.

    Raises ValueError where the markers are missing.
    """
    content = page.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{page}: expected the lines {BEGIN!r} and {END!r} once each; the table goes between them")
    before, rest = content.split(BEGIN)
    table, after = rest.split(END)
    tried = {(row.point, row.killed) for row in rows}
    rows = [*(row for row in read(table) if (row.point, row.killed) not in tried), *rows]
    replace_durably(page, f"{before}{BEGIN}\n{text(rows, cases)}\n{END}{after}".encode())


def read(table: str) -> Iterator[Row]:
    """Yield the rows of a table that `text` made."""
    for line in re.findall(r"^\| `(.*)$", table, flags=re.MULTILINE):
        point, *cells = line.split("|")
        for killed, cell in zip(KILLED, cells, strict=False):
            for recovered, silence in re.findall(r"(yes|\*\*no\*\*), (\d+) s", cell):
                yield Row(point.strip(" `"), killed, recovered == "yes", float(silence))


def text(rows: list[Row], cases: int) -> str:
    """Return the table: one line per fault point, one column per process that died there."""
    recovered = sum(row.recovered for row in rows)
    lines = [
        f"Recovered {recovered} of {len(rows)}; {len(rows)} of {cases} deaths were tried.",
        "",
        f"| fault point | {' | '.join(f'{killed} killed' for killed in KILLED)} |",
        "|---|" + "---|" * len(KILLED),
    ]
    for point in dict.fromkeys(row.point for row in rows):
        cells = [_cell(rows, point, killed) for killed in KILLED]
        lines.append(f"| `{point}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[Row], point: str, killed: str) -> str:
    found = [row for row in rows if (row.point, row.killed) == (point, killed)]
    return "; ".join(f"{'yes' if row.recovered else '**no**'}, {row.silence_s:.0f} s" for row in found)
