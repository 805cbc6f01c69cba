"""Training data for tests: files of examples, and what was made of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from umbel.token_file import TokenFile

SECRET = "Zyxwv"
"""A word of examples that no message may repeat."""


def write_lines(path: Path, examples: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in examples))
    return path


def rows(path: Path) -> set[tuple[int, ...]]:
    tokens = TokenFile.open(path)
    return {tuple(ids[:length]) for ids, length in zip(tokens.ids.tolist(), tokens.lengths.tolist(), strict=True)}
