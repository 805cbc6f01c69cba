"""Commands of a site, in the engine's environment: check, serve, status, rollback, promote."""

import asyncio
import json
import time
from typing import Annotated, Any

import typer

from umbel.adapter import AdapterRef
from umbel.cli.console import AsJson, SiteFile, explained, part_of
from umbel.config import SiteConfig
from umbel.errors import ConfigError
from umbel.site_check import check_files
from umbel.telemetry import configure_logging


def check(site_file: SiteFile) -> None:
    """Validate a site file, offline, and print it as it is understood."""
    with explained():
        config = SiteConfig.load(site_file)
        check_files(config)
        with part_of("site"):
            from client.data import examples
        for file in (config.training.data, config.training.eval_data, *(guard.data for guard in config.shadow.guard)):
            if file is not None:
                examples.check(file)
        print(config.model_dump_json(indent=2))


def serve(site_file: SiteFile) -> None:
    """Run a site: its SGLang server, training inside it, and the control API for Flower. Ctrl-C drains and stops it."""
    with explained():
        config = SiteConfig.load(site_file)
        configure_logging()
        with part_of("site"):
            from client import daemon
        asyncio.run(daemon.serve(config))


def status(site_file: SiteFile, as_json: AsJson = False) -> None:
    """Which version answers now, since when and why, what is waiting, and how to go back.

    Exit status 1 where no daemon runs; what the journal of the last one says is shown then.
    """
    with explained():
        config = SiteConfig.load(site_file)
        report = _status(config)
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            from umbel.cli import status_screen

            status_screen.show(report, str(site_file), now=time.time())
        if not report["running"]:
            raise typer.Exit(1)


def rollback(
    site_file: SiteFile,
    adapter: Annotated[str, typer.Argument(help="Such as support.")],
    force: Annotated[bool, typer.Option("--force", help="Also to what this site went back from by itself.")] = False,
) -> None:
    """Make what answered before answer users again, now: the previous version, or the base before the first one."""
    with explained():
        forced = "?forced=true" if force else ""
        reply = _ask(SiteConfig.load(site_file), "POST", f"/adapters/{adapter}/rollback{forced}")
        print(f"{adapter}: {reply['live'] or 'the base'} answers users again; once more would take this back")


def promote(site_file: SiteFile, ref: Annotated[str, typer.Argument(help="Such as support@v3.")]) -> None:
    """Make a judged shadow answer users, also against this site's own verdict, which the federation cannot do."""
    with explained():
        _ask(SiteConfig.load(site_file), "POST", f"/adapters/{AdapterRef.parse(ref)}/promote?forced=true")
        print(f"{ref} answers users; back: umbel rollback {site_file} {AdapterRef.parse(ref).name}")


class _NoDaemon(ConfigError):
    """Nobody listens on the site's socket."""


def _status(config: SiteConfig) -> dict[str, Any]:
    """What the daemon says; without one what its journal does, if there ever was one."""
    try:
        return _ask(config, "GET", "/status")
    except _NoDaemon as nobody:
        with part_of("site"):
            from client import journal_view
        try:
            return journal_view.without_daemon(config)
        except FileNotFoundError:
            raise nobody from None


def _ask(config: SiteConfig, method: str, path: str) -> dict[str, Any]:
    """One call of the site's control API."""
    import httpx

    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.socket)), timeout=60) as client:
            reply = client.request(method, f"http://site{path}")
    except httpx.TransportError as error:
        raise _NoDaemon(f"{config.socket}: nobody answers ({error}); is `umbel serve` running?") from error
    body: dict[str, Any] = reply.json()
    if reply.status_code != 200:
        raise ConfigError(body["error"]["message"])
    return body
