"""`umbel …`: one command per thing an operator does. Heavy imports wait until a command needs them."""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.cli_adapter import adapter_app
from umbel.cli_bench import bench_app
from umbel.cli_registry import registry_app
from umbel.config import SiteConfig
from umbel.console import AsJson, explained, import_part
from umbel.errors import ConfigError
from umbel.telemetry import configure_logging

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print locals, and a local may be private text
    help="Federated LoRA fine-tuning whose clients serve.",
)
app.add_typer(adapter_app, name="adapter")
app.add_typer(registry_app, name="registry")
app.add_typer(bench_app, name="bench")

SiteFile = Annotated[Path, typer.Argument(help="The site file, such as sites/clinic-a.toml.")]


@app.command()
def check(site_file: SiteFile) -> None:
    """Validate a site file, offline, and print it as it is understood."""
    with explained():
        config = SiteConfig.load(site_file)
        config.check_files()
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


@app.command()
def status(site_file: SiteFile, as_json: AsJson = False) -> None:
    """Which version answers now, since when, what is waiting, how training stands."""
    with explained():
        report = _ask(SiteConfig.load(site_file), "GET", "/status")
        print(json.dumps(report, indent=2) if as_json else _status_text(report))


@app.command()
def rollback(site_file: SiteFile, adapter: Annotated[str, typer.Argument(help="Such as support.")]) -> None:
    """Make what answered before answer users again, now: the previous version, or the base before the first one."""
    with explained():
        reply = _ask(SiteConfig.load(site_file), "POST", f"/adapters/{adapter}/rollback")
        print(f"{adapter}: {reply['live'] or 'the base'} answers users again; once more would take this back")


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


def _status_text(report: dict[str, Any]) -> str:
    engine = report["engine"]
    lines = [f"site {report['site']}: engine {'ready at ' + engine['url'] if engine['ready'] else 'starting'}"]
    for name, aliases in report["aliases"].items():
        verb = "answers" if engine["ready"] else "will answer"
        lines.append(f"{name}: {aliases['live'] or 'the base'} {verb} users")
        lines.append(f"  shadow {aliases['shadow'] or '-'}, previous {aliases['previous'] or '-'}")
        for at, event, version in report["history"][name][:5]:
            lines.append(f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} {name}@v{version} {event}")
        if aliases["previous"]:
            lines.append(f"  back to {aliases['previous']}: umbel rollback SITE_FILE {name}")
    training = report["training"] or {}
    if training.get("job"):
        lines.append(
            f"training: {training['job']} {training['state']}, {training['steps']} steps, share {training['share']:.0%}"
        )
    lines.append(f"rounds waiting or running: {', '.join(report['open_rounds']) or 'none'}")
    return "\n".join(lines)


def _ask(config: SiteConfig, method: str, path: str) -> dict[str, Any]:
    """One call of the site's control API."""
    import httpx

    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.socket)), timeout=60) as client:
            reply = client.request(method, f"http://site{path}")
    except httpx.TransportError as error:
        raise ConfigError(f"{config.socket}: nobody answers ({error}); is `umbel serve` running?") from error
    body: dict[str, Any] = reply.json()
    if reply.status_code != 200:
        raise ConfigError(body["error"]["message"])
    return body


if __name__ == "__main__":
    app()
