"""`umbel registry …`: make a registry, and let others read it over HTTP."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from umbel.cli.console import Registry, calls, explained, part_of
from umbel.telemetry import configure_logging

INIT = "umbel registry init --registry /srv/umbel/registry"
SERVE = "umbel registry serve --registry /srv/umbel/registry"
registry_app = typer.Typer(
    no_args_is_help=True, help="Make the centre's registry, or serve it over HTTP.", epilog=calls(INIT, SERVE)
)


@registry_app.command("init", epilog=calls(INIT, INIT + " --blobs s3://bucket/umbel"))
def init(
    registry: Registry,
    blobs: Annotated[str, typer.Option(help="Where weights shall lie: a path or URL, such as s3://bucket/umbel.")] = "",
) -> None:
    """Make an empty registry; `flwr run` makes one by itself, with its weights beside it."""
    with explained():
        with part_of("server"):
            from server.registry.registry import AdapterRegistry
        with closing(AdapterRegistry(registry, create=True, blobs=blobs)) as opened:
            print(f"{registry}: registry {opened.lineage}, weights at {opened.blobs.url}")


@registry_app.command("serve", epilog=calls(SERVE, SERVE + " --token-file /srv/umbel/token"))
def serve(
    registry: Registry,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 8650,
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the token that changes need; without it the API only reads.")
    ] = None,
) -> None:
    """Serve `umbel adapter`'s commands over HTTP, under the same names: GET to read, POST with the token to change."""
    with explained():
        configure_logging()
        with part_of("server"):
            from server.registry import api
        api.serve(registry, host, port, token_file)
