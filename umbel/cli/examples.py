"""`umbel examples …`: what users agreed to have trained on, and what becomes of it."""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbel.cli.console import AsJson, SiteFile, explained, part_of
from umbel.config import SiteConfig
from umbel.errors import ConfigError

if TYPE_CHECKING:  # the store is in the engine's environment only
    from client.data.user_examples import ExampleStore

examples_app = typer.Typer(no_args_is_help=True, help="Examples from users who agreed: list, release or forget.")


@examples_app.command("ls")
def ls(
    site_file: SiteFile,
    texts: Annotated[bool, typer.Option("--texts", help="Also what they say, scrubbed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Every example: its number, when it was given, to which version, and whether it may be trained on."""
    with _opened(site_file) as store:
        rows = store.rows(texts)
        print(json.dumps(rows, indent=2) if as_json else "\n".join(map(_line, rows)) or "no examples")


@examples_app.command("release")
def release(
    site_file: SiteFile,
    numbers: Annotated[list[int] | None, typer.Argument(help="As `ls` numbers them; all that wait without it.")] = None,
) -> None:
    """Let examples be trained on, from the next start of `umbel serve` on."""
    with _opened(site_file) as store:
        print(f"{len(store.release(numbers))} examples released; the next `umbel serve` trains on them")


@examples_app.command("forget")
def forget(site_file: SiteFile, user: Annotated[str, typer.Option(help="As requests call them in `user`.")]) -> None:
    """Delete all that a user gave. What is already in the training data leaves it with the next start."""
    with _opened(site_file) as store:
        print(f"{store.forget(user)} examples deleted; restart `umbel serve` to take them out of the training data")


@contextmanager
def _opened(site_file: Path) -> Iterator["ExampleStore"]:
    with explained():
        config = SiteConfig.load(site_file)
        with part_of("site"):
            from client.data import user_examples
        if not (config.site.state_dir / user_examples.DATABASE).is_file():
            raise ConfigError(
                f"{config.site.state_dir}: no example was ever kept; [examples].enabled lets users give them"
            )
        with closing(user_examples.ExampleStore.of(config)) as store:
            yield store


def _line(row: dict[str, Any]) -> str:
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["at"]))
    line = f"{row['id']:>6}  {at}  {row['version']:<16} {row['kind']:<9} {row['state']}"
    return "\n".join([line, *(f"        {one['role']}: {one['content']}" for one in row.get("messages", []))])
