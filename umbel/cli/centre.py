"""Commands of Flower's environment that belong to no registry: supernode, bundle."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from umbel.cli.console import SiteFile, explained, part_of
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig
from umbel.telemetry import configure_logging


def supernode(site_file: SiteFile, context: typer.Context) -> None:
    """Run the site's `flower-supernode` with the options that follow, and restart it when it gets stuck."""
    with explained():
        with part_of("server"):
            from client.flower import supernode as flower_supernode
        command = flower_supernode.command(SiteConfig.load(site_file), context.args)
        configure_logging()
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
