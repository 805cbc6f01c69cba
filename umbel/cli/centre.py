"""Commands of Flower's environment that belong to no registry: supernode, bundle."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from umbel.cli.console import SiteFile, calls, explained, part_of
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig
from umbel.telemetry import configure_logging

EPILOGS = {
    "supernode": calls(
        "umbel supernode clinic-a.toml --superlink centre.example.org:8000 --root-certificates certs/ca.crt",
        "umbel supernode clinic-b.toml --superlink 127.0.0.1:8000 --insecure --port 9095",
    ),
    "bundle": calls("umbel bundle /tmp/umbel-app", "flwr run /tmp/umbel-app centre --stream"),
}
"""Name of a command → the example calls below its help."""


def supernode(site_file: SiteFile, context: typer.Context) -> None:
    """Run the site's `flower-supernode` with the options that follow, and restart it when it gets stuck.

    --superlink is needed; a second SuperNode on the same machine also needs a --port of its own.
    """
    with explained():
        with part_of("server"):
            from client.flower import supernode as flower_supernode
        configure_logging()
        command = flower_supernode.command(SiteConfig.load(site_file), context.args)
        status = asyncio.run(flower_supernode.run(command))
    raise typer.Exit(status)


def bundle(into: Annotated[Path, typer.Argument(help="A new folder; `flwr run` it.")]) -> None:
    """Copy the app that Flower ships into a folder; `flwr run` in a checkout would walk its virtual environments."""
    with explained():
        if into.is_file():
            raise ConfigError(f"{into} is a file; choose a new folder")
        if into.exists() and any(into.iterdir()):
            raise ConfigError(f"{into} is not empty; choose a new folder")
        with part_of("server"):
            from server import bundle as exporter
        print(f"flwr run {exporter.export(Path(exporter.__file__).parents[1], into)} …")
