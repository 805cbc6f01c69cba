"""`umbel fleet …`: list a registry's adapters, and bring all sites to the version of one that is live in it."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.cli.console import AsJson, Name, Registry, Why, calls, explained, part_of, reason, say, who
from umbel.errors import ConfigError

AT = "--registry /srv/umbel/registry --app /tmp/umbel-app --federation centre"
LS = "umbel fleet ls --registry /srv/umbel/registry"
ROLLBACK, RECONCILE = f'umbel fleet rollback support --why "worse answers" {AT}', f"umbel fleet reconcile support {AT}"
SIGNED = """ --run-config 'signing-key="/srv/umbel/signing.key"'"""
fleet_app = typer.Typer(
    no_args_is_help=True,
    help="List the adapters, and have the sites answer with the version that is live in the registry.",
    epilog=calls(LS, ROLLBACK, RECONCILE),
)

App = Annotated[Path, typer.Option(help="The app's folder, as `umbel bundle` made it.")]
Federation = Annotated[str, typer.Option(help="The SuperLink's name in Flower's config.toml; without it its default.")]
RunConfig = Annotated[str, typer.Option(help="More settings of the run, such as 'signing-key=\"/srv/signing.key\"'.")]


@fleet_app.command("ls", epilog=calls(LS, LS + " --adapter support"))
def ls(
    registry: Registry,
    adapter: Annotated[str, typer.Option(help="Only this one, with what was said of each site.")] = "",
    as_json: AsJson = False,
) -> None:
    """List every adapter: the version that is live, the last round and its sites, and whether a run is under way.

    One that is damaged is named, and ends the command with status 1.
    """
    with explained():
        with part_of("server"):
            from server.registry import index, views
            from server.registry.registry import AdapterRegistry
        with index.explained(registry), closing(AdapterRegistry(registry)) as opened:
            rows = views.fleet(opened, adapter or None)
            if as_json:
                print(json.dumps(rows, indent=2))
            else:
                say(*(line for row in rows for line in _adapter_lines(row, told=bool(adapter))))
        if any(row["damage"] for row in rows):
            raise typer.Exit(1)


@fleet_app.command("rollback", epilog=calls(ROLLBACK, ROLLBACK + SIGNED))
def rollback(
    registry: Registry, adapter: Name, app: App, federation: Federation = "", why: Why = "", run_config: RunConfig = ""
) -> None:
    """Point head and live back to `previous`, and bring every site there; a second call undoes the first."""
    with explained():
        command, because = _command(app, federation, registry, adapter, run_config), reason(why)
        with part_of("server"):
            from server.registry import run_lock
            from server.registry.registry import AdapterRegistry
        with closing(AdapterRegistry(registry)) as opened:
            if not run_lock.under_way(opened.root, adapter):
                _require_superlink(command[0], federation)
            back = opened.roll_back(adapter, who=who(), why=because)
            print(f"{adapter}: {back} is live again at the centre")
            _follow(opened, adapter, command)


@fleet_app.command("reconcile", epilog=calls(RECONCILE, RECONCILE + SIGNED))
def reconcile(
    registry: Registry, adapter: Name, app: App, federation: Federation = "", run_config: RunConfig = ""
) -> None:
    """Bring every site that is online to the version that is live; a site that has refused it keeps its own."""
    with explained():
        command = _command(app, federation, registry, adapter, run_config)
        with part_of("server"):
            from server.registry.registry import AdapterRegistry
        with closing(AdapterRegistry(registry)) as opened:
            if "live" not in opened.aliases(adapter):
                raise ConfigError(f"{adapter}: nothing was ever live in {registry}; the sites answer as they are")
            _follow(opened, adapter, command)


def _command(app: Path, federation: str, registry: Path, adapter: str, more: str) -> list[str]:
    """Return the command of a run without rounds; raise ConfigError before anything has been moved."""
    beside = Path(sys.executable).with_name("flwr")
    flwr = str(beside) if beside.is_file() else shutil.which("flwr")
    if flwr is None:
        raise ConfigError("flwr is not here: this command belongs to Flower's environment (.venv)")
    if not (app / "pyproject.toml").is_file():
        raise ConfigError(f"{app}: no app here; `umbel bundle {app}` makes one")
    settings = f"rounds=0 registry={json.dumps(str(registry.absolute()))} adapter={json.dumps(adapter)} {more}".strip()
    return [flwr, "run", str(app), *[federation] * bool(federation), "--stream", "--run-config", settings]


def _require_superlink(flwr: str, federation: str) -> None:
    """Raise ConfigError, before anything has been moved, unless the SuperLink answers `flwr list`."""
    asked = [flwr, "list", *[federation] * bool(federation), "--limit", "1"]
    ended = subprocess.run(asked, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = " ".join(re.sub(r"[\u2500-\u257f]", " ", ended.stderr or ended.stdout).split())  # without its frame
        raise ConfigError(f"nothing was moved: `flwr {' '.join(asked[1:])}` says: {said}")


def _follow(registry: Any, adapter: str, command: list[str]) -> None:
    """Run the command and print the outcome at each site; exit with status 1 when a site could not be reached."""
    from server.registry import run_lock
    from server.registry.events import EVENTS, EventReader

    if run_lock.under_way(registry.root, adapter):
        print(f"{adapter}: a run is under way; it brings the sites there before its next round")
        return

    events = EventReader(registry.root / EVENTS)
    list(events.read())  # skips the events of earlier runs
    ended = subprocess.run(command, stdout=sys.stderr, check=False)
    told = [event for event in events.read() if event["adapter"] == adapter]
    found = next((event for event in reversed(told) if event["event"] == "fleet.reconciled"), None)
    if ended.returncode or found is None or told[-1]["event"] != "run.finished":
        raise ConfigError(
            f"{adapter}: the run did not come to its end, `flwr list` and `flwr log` say why; the registry says that "
            f"{registry.aliases(adapter)['live']} is live, and `umbel fleet reconcile {adapter} …` brings the sites "
            "there (another roll-back would take this one back)"
        )
    say(*_lines(found))
    if found["missed"]:
        raise typer.Exit(1)


def _lines(found: dict[str, Any]) -> list[str]:
    """Format a `fleet.reconciled` event, one line per site."""
    live = found["live"]
    lines = [f"{site}: {live} answers, instead of {before}" for site, before in found["brought"].items()]
    lines += [f"{site}: {live} answered already" for site in found["already"]]
    lines += [f"{site}: keeps what it has: {why}" for site, why in found["kept"].items()]
    later = "not brought there, tried again with the next run"
    lines += [f"{site}: {later}: {why}" for site, why in found["missed"].items()]
    return sorted(lines) or ["no site is online; each follows with the next run"]


def _adapter_lines(row: dict[str, Any], *, told: bool) -> list[str]:
    """Format a row of `views.fleet`; with what was `told` of each site, a line each."""
    if row["damage"]:
        return [f"{row['adapter']}: {row['damage']}"]
    onwards = "" if row["head"] == row["live"] else f", training goes on from {row['head']}"
    judged = f", {row['shadow']} is being judged" if row["shadow"] else ""
    run = ", a run is under way" if row["under_way"] else ""
    lines = [f"{row['adapter']}: {row['live'] or 'no version'} is live{onwards}{judged}{run}"]
    if row["round"]:
        sites = " ".join(f"{site} {share:.2f}" for site, share in row["sites"].items())
        lines.append(f"  round {row['round']} {row['state']} at {row['at']}  {sites}".rstrip())
    if told:
        lines += [f"  {site}: {why}" for site, why in row["reasons"].items()]
    return lines
