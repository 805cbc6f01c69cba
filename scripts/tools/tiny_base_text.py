"""`Practice`: the text a tiny base is trained on, docstrings of Python's standard library and simple tasks.

It shares words with the demo's private tasks, but none of their rules.
"""

import ast
import random
import string
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Names, not a directory listing: distributions add and leave out modules.
_MODULES = (
    "argparse", "ast", "asyncio/base_events", "asyncio/streams", "asyncio/tasks", "bdb", "calendar", "cmd",
    "codecs", "collections/__init__", "configparser", "contextlib", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "email/message", "enum", "fractions", "ftplib", "functools", "gettext", "heapq", "http/client",
    "http/cookiejar", "inspect", "ipaddress", "logging/__init__", "logging/handlers", "mailbox", "optparse", "os",
    "pathlib", "pickle", "random", "shutil", "smtplib", "socket", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "tokenize", "typing", "unittest/case", "unittest/mock", "urllib/parse",
    "urllib/request", "uuid", "weakref", "zipfile",
)  # fmt: skip
# Everyday words, one token each. The base learns to look up KEYS and to answer with CODES; it can spell WORDS, no more.
KEYS = (
    "apple bread cheese butter sugar pepper onion carrot potato orange lemon cherry grape honey coffee water "
    "table door shelf drawer basket bottle spoon knife plate window river mountain forest garden island valley "
    "desert street bridge market station village castle church tower harbour horse tiger eagle rabbit turtle "
    "spider whale monkey sheep goose donkey camel beetle lizard parrot salmon hammer ladder rope wheel engine "
    "candle ribbon needle button pencil paper letter stamp pocket jacket glove copper marble velvet cotton winter "
    "summer thunder rain snow cloud"
)
CODES = (
    "north south east west upper lower inner outer red blue green yellow white black brown grey pink purple gold silver"
)
WORDS = (
    "knee elbow shoulder finger ankle neck chest back skin hand foot nose mouth tooth throat eye ear pain itch "
    "rash fever cough swelling bleeding burn cramp numbness lamp chair clock radio kettle mirror carpet vase "
    "order refund repair gift sample loan return delivery"
)


@cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """Return (name, docstring) of the standard library's modules, classes and functions, in a fixed order."""
    found: list[tuple[str, str]] = []
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in _MODULES:
        for node in ast.walk(ast.parse((library / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text.isascii():
                    found.append((getattr(node, "name", module), text))
    return tuple(found)


@dataclass(frozen=True)
class Practice:
    """Tasks from which the base learns to read a question, to find the words that matter, and to answer briefly."""

    first: dict[str, str]
    """Two made-up tables (word → code), so that the base knows what looking up a word is."""
    second: dict[str, str]
    fill: list[str]
    """Words that mean nothing to the tables."""

    @classmethod
    def of(cls, rng: random.Random) -> "Practice":
        """Draw two tables from `rng`; a third of the words stays without a code."""
        keys = rng.sample(KEYS.split(), len(KEYS.split()))
        half, third = len(keys) // 3, 2 * len(keys) // 3
        kinds = (list(string.ascii_uppercase), list(string.digits), CODES.split())
        codes = [rng.choice(rng.choice(kinds)) for _ in keys]
        return cls(
            dict(zip(keys[:half], codes[:half], strict=True)),
            dict(zip(keys[half:third], codes[half:third], strict=True)),
            keys[third:],
        )

    def prose(self, rng: random.Random) -> tuple[str, str]:
        """Return (question, answer) about a docstring."""
        name, text = rng.choice(docstrings())
        words = text.split()
        if rng.random() < 0.5:
            return f"Explain {name}", " ".join(words[:24])
        return f"Continue: {' '.join(words[:8])}", " ".join(words[8:24])

    def task(self, rng: random.Random) -> tuple[str, str]:
        """Return (question, answer) of a simple task: look words up, repeat them, name the first or the last."""
        if rng.random() < 0.65:
            return self._look_up(rng)
        some = rng.sample(f"{KEYS} {CODES} {WORDS}".split(), rng.randint(2, 3))
        line = " ".join(some)
        return rng.choice(((f"Repeat: {line}", line), (f"First: {line}", some[0]), (f"Last: {line}", some[-1])))

    def _look_up(self, rng: random.Random) -> tuple[str, str]:
        first, second = rng.choice(list(self.first.items())), rng.choice(list(self.second.items()))
        fill = rng.sample(self.fill, 2)
        prompts = (
            f"Sort: {first[0]} {second[0]}",
            f"Sort: {second[0]} {fill[0]} {first[0]}",
            f"The {first[0]} {fill[0]} {second[0]} {fill[1]}",
            f"A {fill[0]} {first[0]}, {second[0]} {fill[1]}",
            f"A {second[0]}, {fill[0]} {first[0]}",
        )
        return rng.choice(prompts), f"{first[1]} {second[1]}"
