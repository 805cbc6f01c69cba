"""`umbel …`: one command per thing an operator does. Heavy imports wait until a command needs them."""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.adapter import AdapterRef
from umbel.cli_adapter import adapter_app
from umbel.cli_bench import bench_app
from umbel.cli_fleet import fleet_app
from umbel.cli_live import live_app
from umbel.cli_registry import registry_app
from umbel.config import SiteConfig
from umbel.console import AsJson, explained, import_part
from umbel.errors import ConfigError
from umbel.site_check import check_files
from umbel.telemetry import configure_logging

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print locals, and a local may be private text
    help="Federated LoRA fine-tuning whose clients serve.",
)
app.add_typer(adapter_app, name="adapter")
app.add_typer(fleet_app, name="fleet")
app.add_typer(registry_app, name="registry")
app.add_typer(live_app, name="live")
app.add_typer(bench_app, name="bench")

SiteFile = Annotated[Path, typer.Argument(help="The site file, such as sites/clinic-a.toml.")]


@app.command()
def check(site_file: SiteFile) -> None:
    """Validate a site file, offline, and print it as it is understood."""
    with explained():
        config = SiteConfig.load(site_file)
        check_files(config)
        examples = import_part("client.examples", extra="site")
        for file in (config.training.data, config.training.eval_data, *(guard.data for guard in config.shadow.guard)):
            if file is not None:
                examples.check(file)
        print(config.model_dump_json(indent=2))


@app.command()
def serve(site_file: SiteFile) -> None:
    """Run a site: its SGLang server, training inside it, and the control API for Flower. Ctrl-C drains and stops it."""
    with explained():
        config = SiteConfig.load(site_file)
        configure_logging()
        daemon = import_part("client.daemon", extra="site")
        asyncio.run(daemon.serve(config))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def supernode(site_file: SiteFile, context: typer.Context) -> None:
    """Run the site's `flower-supernode`, with the options that follow; one that got stuck is started anew."""
    with explained():
        part = import_part("client.supernode", extra="server")
        command = part.command(SiteConfig.load(site_file), context.args)
        configure_logging()
        status = asyncio.run(part.run(command))
    raise typer.Exit(status)


@app.command()
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
            from umbel import status_screen

            status_screen.show(report, str(site_file), now=time.time())
        if not report["running"]:
            raise typer.Exit(1)


@app.command()
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


@app.command()
def promote(site_file: SiteFile, ref: Annotated[str, typer.Argument(help="Such as support@v3.")]) -> None:
    """Make a judged shadow answer users, also against this site's own verdict, which the federation cannot do."""
    with explained():
        _ask(SiteConfig.load(site_file), "POST", f"/adapters/{AdapterRef.parse(ref)}/promote?forced=true")
        print(f"{ref} answers users; back: umbel rollback {site_file} {AdapterRef.parse(ref).name}")


@app.command()
def bundle(into: Annotated[Path, typer.Argument(help="A new folder; `flwr run` it.")]) -> None:
    """Copy what Flower ships into a folder of its own; `flwr run` in a checkout would walk its virtual environments."""
    with explained():
        if into.is_file():
            raise ConfigError(f"{into} is a file; choose a new folder")
        if into.exists() and any(into.iterdir()):
            raise ConfigError(f"{into} is not empty; choose a new folder")
        exporter = import_part("server.bundle", extra="server")
        print(f"flwr run {exporter.export(Path(exporter.__file__).parents[1], into)} …")


class _NoDaemon(ConfigError):
    """Nobody listens on the site's socket."""


def _status(config: SiteConfig) -> dict[str, Any]:
    """What the daemon says; without one what its journal does, if there ever was one."""
    try:
        return _ask(config, "GET", "/status")
    except _NoDaemon as nobody:
        journal_view = import_part("client.journal_view", extra="site")
        try:
            report: dict[str, Any] = journal_view.without_daemon(config)
        except FileNotFoundError:
            raise nobody from None
        return report


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


if __name__ == "__main__":
    app()
