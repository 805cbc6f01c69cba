"""`umbel examples …`: list, release or forget the examples that users agreed to have an adapter trained on."""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from umbel.cli.console import AsJson, SiteFile, calls, explained, part_of
from umbel.errors import ConfigError
from umbel.printable import escaped, one_line
from umbel.site.config import SiteConfig

if TYPE_CHECKING:  # the store is in the engine's environment only
    from client.data.user_examples import ExampleStore

LONGEST_ROLE = 20
"""Characters of a role that are shown."""
OfAdapter = Annotated[str | None, typer.Option("--adapter", help="Of this adapter only. Default: of all.")]
examples_app = typer.Typer(
    no_args_is_help=True,
    help="Examples from users who agreed: list, release or forget.",
    epilog=calls("umbel examples ls clinic-a.toml", "umbel examples release clinic-a.toml 3 4"),
)


@examples_app.command(
    "ls", epilog=calls("umbel examples ls clinic-a.toml", "umbel examples ls clinic-a.toml --texts --json")
)
def ls(
    site_file: SiteFile,
    texts: Annotated[bool, typer.Option("--texts", help="Also their texts, scrubbed.")] = False,
    adapter: OfAdapter = None,
    as_json: AsJson = False,
) -> None:
    """List every example: its number, when it was given to which adapter and version, and if it may be trained on."""
    with _opened(site_file) as store:
        rows = store.rows(texts, adapter)
        if as_json:
            print(json.dumps(rows, indent=2))  # ASCII only: no text of an example drives a terminal
            return
        console = Console(highlight=False)
        for row in rows:
            _show(row, console)
        if not rows:
            print("no examples")


@examples_app.command(
    "release", epilog=calls("umbel examples release clinic-a.toml", "umbel examples release clinic-a.toml 3 4")
)
def release(
    site_file: SiteFile,
    numbers: Annotated[list[int] | None, typer.Argument(help="As `ls` shows them. Default: all that wait.")] = None,
    adapter: OfAdapter = None,
) -> None:
    """Release examples for the training of their adapters, from the next round on."""
    with _opened(site_file) as store:
        print(f"{len(store.release(numbers, adapter))} examples released; the next round trains on them")


@examples_app.command("forget", epilog=calls("umbel examples forget clinic-a.toml --user alice"))
def forget(
    site_file: SiteFile,
    user: Annotated[str, typer.Option(help="The value of `user` in their requests.")],
    adapter: OfAdapter = None,
) -> None:
    """Delete all examples of a user. No round that begins later is trained on them."""
    with _opened(site_file) as store:
        gone = store.forget(user, adapter)
        print(f"{gone} examples deleted; no round that begins from now on is trained on them")


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


def _show(row: dict[str, Any], console: Console) -> None:
    """Print one example. No line of its texts, wrapped ones included, begins further left than the texts do."""
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["at"]))
    head = f"{row['id']:>6}  {at}  {row['adapter']:<12} {row['version']:<16} {row['kind']:<9} {row['state']}"
    console.print(Text(one_line(head + ("  pair" if row["pair"] else ""))), soft_wrap=True)
    texts = Table.grid(padding=(0, 1))
    texts.add_column(no_wrap=True)
    texts.add_column(overflow="fold")
    worse = [{"role": "worse", "content": row["rejected"]}] if row.get("rejected") else []
    for message in (*row.get("messages", []), *worse):
        said = escaped(message["content"].replace("\r\n", "\n"))
        texts.add_row(Text(f"        {one_line(message['role'], LONGEST_ROLE)}:"), Text(said))
    if texts.row_count:
        console.print(texts)
