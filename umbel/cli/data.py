"""`umbel data`: examples as they are trained on: their text and tokens, what carries a loss, what is refused."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from umbel.cli.console import SiteFile, adapter_of, calls, explained, part_of, require_transformers
from umbel.errors import NotFound
from umbel.site.config import SiteConfig

if TYPE_CHECKING:  # the command imports them when it needs them
    from client.data.chat_tokens import ChatTokenizer
    from client.data.inspection import Inspected

EPILOG = calls(
    "umbel data clinic-a.toml",
    "umbel data clinic-a.toml --line 17",
    "umbel data clinic-a.toml --file private/eval.jsonl",
    "umbel data clinic-a.toml --adapter triage",
    "umbel data clinic-a.toml --json",
)


def data(
    site_file: SiteFile,
    line: Annotated[
        int | None, typer.Option(min=1, help="Show this line (in a JSON array: this item) in full, token by token.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Another file of examples. Default: the adapter's data.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="The adapter that is trained on them; needed where a site has several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per example, for programs.")] = False,
) -> None:
    """Show how examples are rendered and tokenised, what carries a loss, and what is cut, left out or refused.

    It prints private texts. Exit status 1 where an example is refused.
    """
    with explained():
        config = SiteConfig.load(site_file)
        require_transformers()
        with part_of("site"):
            from client.data.chat_tokens import ChatTokenizer
            from client.data.inspection import inspect
            from umbel.cli import data_screen
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal without UTF-8
        adapter = adapter_of(config, adapter)
        path = file or config.data(adapter)
        tokenizer = ChatTokenizer.load(config.model.path)
        examples: Iterable[Inspected] = inspect(path, tokenizer, config.training.seq_len)
        only = None if line is None else _only(examples, line, path)
        if as_json:
            refused = _print_json(examples if only is None else [only], tokenizer, path)
        elif only is not None:
            refused = data_screen.show_one(only, tokenizer, path)
        else:
            refused = data_screen.show(examples, tokenizer, path, config, adapter)
        if refused:
            raise typer.Exit(1)


def _only(examples: "Iterable[Inspected]", number: int, path: Path) -> "Inspected":
    """Return the example with that number; raise NotFound."""
    for example in examples:
        if example.number == number:
            return example
    raise NotFound(f"{path}:{number}: no example is there; blank lines are none")


def _print_json(examples: "Iterable[Inspected]", tokenizer: "ChatTokenizer", path: Path) -> bool:
    """Print one object per example; return whether one is refused."""
    from client.data.inspection import prompt, trained

    refused = False
    for example in examples:
        why = example.reason(path)
        shown = {
            "line": example.number,
            "prompt": prompt(example, tokenizer),
            "trained": trained(example, tokenizer),
            "pair": example.pair,
            "tokens": example.tokens,
            "cut": example.cut,
            "dropped": example.dropped,
            "untold": example.untold,
            "refused": why,
        }
        print(json.dumps(shown))  # ASCII only: no text of an example drives a terminal
        refused = refused or why is not None
    return refused
