"""Commands of a site, in the engine's environment: check, serve, status, rollback, promote."""

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbel.adapter import AdapterRef
from umbel.cli.console import AsJson, SiteFile, calls, explained, part_of
from umbel.errors import ConfigError
from umbel.site.check import check_files
from umbel.site.config import SiteConfig
from umbel.telemetry import configure_logging

if TYPE_CHECKING:  # the command imports it when it needs it
    from client.data.examples import Counts

EPILOGS = {
    "check": calls(
        "umbel check clinic-a.toml",
        "umbel check clinic-a.toml --json",
        "UMBEL_SITE__ENGINE__PORT=30001 umbel check clinic-a.toml",
    ),
    "serve": calls("umbel serve clinic-a.toml", "UMBEL_SITE__ENGINE__PORT=30001 umbel serve clinic-a.toml"),
    "status": calls("umbel status clinic-a.toml", "umbel status clinic-a.toml --json"),
    "rollback": calls("umbel rollback clinic-a.toml support", "umbel rollback clinic-a.toml support --force"),
    "promote": calls("umbel promote clinic-a.toml support@v3"),
}
"""Name of a command → the example calls below its help."""


def check(
    site_file: SiteFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved settings as JSON, for programs.")] = False,
) -> None:
    """Check a site file offline: settings, the files they name, and how many examples there are.

    Ends with a line that begins with "ok", or one for each thing that "will bite" although the site can be served.
    """
    with explained():
        config = SiteConfig.load(site_file)
        check_files(config)
        with part_of("site"):
            from client.data import examples
        training = config.training
        counts = examples.count(training.data, training.eval_data, training.eval_fraction)
        guards = {guard.name: len(examples.contents(guard.data)) for guard in config.shadow.guard}
        bites = _bites(config, counts, guards)
        if as_json:
            print(config.model_dump_json(indent=2))
            print(*bites, sep="\n", end="\n" if bites else "", file=sys.stderr)
        else:
            print(*bites or [_all_is_well(config, counts, guards)], sep="\n")


def _all_is_well(config: SiteConfig, counts: "Counts", guards: Mapping[str, int]) -> str:
    """Say in one line what the site will serve and train on."""
    return ", ".join(
        [
            f"ok: {config.site.name}",
            f"base {config.model.served_name} at {config.model.path}",
            f"adapter {' and '.join(config.adapters)}",
            f"{counts.train:,} training and {counts.held_out:,} held-out examples",
            *(f"guard {name} with {number:,}" for name, number in guards.items()),
        ]
    )


def _bites(config: SiteConfig, counts: "Counts", guards: Mapping[str, int]) -> list[str]:
    """Say what will keep this site from promoting any version, one line for each cause."""
    least = config.shadow.min_examples
    more = "more eval_data" if config.training.eval_data else "more data, or eval_data,"
    asked = {"held-out examples": (counts.held_out, more)}
    asked |= {f"examples of guard {name}": (number, "it more") for name, number in guards.items()}
    return [
        f"will bite: {number} {name} are fewer than [shadow].min_examples = {least}: no version can be promoted; "
        f"give {remedy} or lower it"
        for name, (number, remedy) in asked.items()
        if number < least
    ]


def serve(site_file: SiteFile) -> None:
    """Run a site: its SGLang server, training inside it, and the control API for Flower. Ctrl-C drains and stops it."""
    with explained():
        config = SiteConfig.load(site_file)
        configure_logging()
        with part_of("site"):
            from client import daemon
        asyncio.run(daemon.serve(config))


def status(site_file: SiteFile, as_json: AsJson = False) -> None:
    """Show which version answers now, since when and why, which versions wait, and how to go back.

    Exit status 1 where no daemon runs; the journal of the last one is shown then.
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
    force: Annotated[
        bool, typer.Option("--force", help="Also to a version from which this site went back by itself.")
    ] = False,
) -> None:
    """Let the previous version answer users again, now; the base, where no version was live before this one."""
    with explained():
        forced = "?forced=true" if force else ""
        reply = _ask(SiteConfig.load(site_file), "POST", f"/adapters/{adapter}/rollback{forced}")
        print(f"{adapter}: {reply['live'] or 'the base'} answers users again; once more would take this back")


def promote(site_file: SiteFile, ref: Annotated[str, typer.Argument(help="Such as support@v3.")]) -> None:
    """Let a judged shadow answer users, even against this site's verdict; the federation cannot do the latter."""
    with explained():
        _ask(SiteConfig.load(site_file), "POST", f"/adapters/{AdapterRef.parse(ref)}/promote?forced=true")
        print(f"{ref} answers users; back: umbel rollback {site_file} {AdapterRef.parse(ref).name}")


class _NoDaemon(ConfigError):
    """No daemon listens on the site's socket."""


def _status(config: SiteConfig) -> dict[str, Any]:
    """Return the daemon's status; if no daemon runs, the status read from its journal.

    Raises ConfigError where no daemon runs and there is no journal.
    """
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
    """Call the site's control API; raise ConfigError with the daemon's reason, or where no daemon answers."""
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
