"""`umbel adapter load`, `unload`: serve an adapter that is never trained, at a site that runs; in its environment."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from umbel.adapter import ServedRef, check_name
from umbel.cli.console import SiteFile, calls, explained, say
from umbel.cli.daemon import ask
from umbel.site.config import SiteConfig

LOAD_S = 300.0
"""Seconds that reading, loading and warming an adapter may take."""
UNTIL_START = "it stands under [[serve]] in the site file, whose path is served again from the next start on"

ServedName = Annotated[str, typer.Argument(help="Name that users put into `model`, such as legal.")]


def load(
    site_file: SiteFile,
    name: ServedName,
    path: Annotated[Path, typer.Argument(help="PEFT directory: adapter_config.json and adapter_model.safetensors.")],
) -> None:
    """Serve a PEFT directory at a site under a name of its own, now and after restarts; it is never trained.

    Under a name that is served already it takes the other one's place, without failing a request.
    """
    with explained():
        given = f"/served/{check_name(name)}?path={quote(str(path.absolute()))}"
        reply = ask(SiteConfig.load(site_file), "POST", given, LOAD_S)
        ref = ServedRef.of(reply["name"], reply["digest"])
        say(f"{ref} answers users of {name!r}", *([f"until the next start: {UNTIL_START}"] if reply["listed"] else []))


def unload(site_file: SiteFile, name: ServedName) -> None:
    """Serve an adapter no more that is only served; requests that it is answering end as they began."""
    with explained():
        reply = ask(SiteConfig.load(site_file), "DELETE", f"/served/{check_name(name)}")
        since = datetime.fromtimestamp(reply["since"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        say(f"{name} is not served any more; it was since {since}, from {reply['path']}")
        if reply["listed"]:
            say(f"until the next start: {UNTIL_START}")


def register(group: typer.Typer) -> None:
    """Add the commands to `umbel adapter`."""
    there = "umbel adapter load clinic-a.toml legal /srv/adapters/legal"
    away = "umbel adapter unload clinic-a.toml legal"
    group.command("load", epilog=calls(there, away))(load)
    group.command("unload", epilog=calls(away, there))(unload)
