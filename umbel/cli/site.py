"""Commands of a site, in the engine's environment: check, serve, status, rollback, promote."""

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbel.adapter import AdapterRef
from umbel.cli.console import AsJson, SiteFile, calls, explained, part_of, require_transformers, say
from umbel.cli.daemon import NoDaemon, ask
from umbel.errors import ConfigError, DataError, UmbelError
from umbel.site.check import check_files, doubt_of_origin, ports_in_use
from umbel.site.config import SiteConfig
from umbel.site.memory_plan import memory_plan
from umbel.site.slow_dtype import slow_dtype
from umbel.telemetry import configure_logging

if TYPE_CHECKING:  # the command imports it when it needs it
    from client.data.survey import AdapterSurvey

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
    """Check a site file offline: settings, the files they name, every example with its tokens, and ports in use.

    Says how memory will be divided, by arithmetic. Ends with a line that begins with "ok", or one for each thing that
    "will bite" although the site can be served.
    """
    with explained():
        config = SiteConfig.load(site_file)
        check_files(config)
        require_transformers()
        with part_of("site"):
            from client.data.chat_tokens import ChatTokenizer
            from client.data.summary import warnings
            from client.data.survey import survey_adapter
        tokenizer = ChatTokenizer.load(config.model.path)
        surveyed = {name: survey_adapter(config, name, tokenizer) for name in config.adapters}
        if found := [*ports_in_use(config), *_data_mistakes(surveyed, site_file, config)]:
            raise ConfigError("\n".join(map(str, found)))
        plan = memory_plan(config)
        doubts = (slow_dtype(config), plan and plan.mistake(), doubt_of_origin(config), _too_few_slots(config))
        bites = [told for told in doubts if told]
        for name, survey in surveyed.items():
            summaries = {file: one.summary for file, one in survey.files.items()}
            bites += warnings(config, name, summaries, survey.sides.asked, survey.sides.withheld)
        bites = [f"will bite: {told}" for told in bites]
        if as_json:
            print(config.model_dump_json(indent=2))
            print(*bites, sep="\n", end="\n" if bites else "", file=sys.stderr)
        else:
            say(*([plan.told()] if plan else []), *bites or [_all_is_well(config, surveyed)])


def _too_few_slots(config: SiteConfig) -> str | None:
    """Say that adapters will wait for each other's slots; None where all have one, the base included."""
    needed = 1 + len(config.adapter) + len(config.serve)
    if config.slots >= needed:
        return None
    return (
        f"[engine].slots = {config.slots} are fewer than the base and {needed - 1} adapters: users of some will wait "
        "for those of others; raise it, or leave it out"
    )


def _data_mistakes(surveyed: "Mapping[str, AdapterSurvey]", site_file: Path, config: SiteConfig) -> list[UmbelError]:
    """Return what keeps the examples from being used, and for each file the command that shows what is refused."""
    from client.data.summary import DATA, setting_of

    told: dict[str, UmbelError] = {}  # adapters may share a file: its mistakes are told once
    for adapter, survey in surveyed.items():
        for name, mistakes in survey.mistakes.items():
            found: list[UmbelError] = [*mistakes]
            file = survey.files.get(name)
            if file is not None and file.refused:
                which = "" if len(surveyed) == 1 else f" --adapter {adapter}"
                which += "" if name == DATA else f" --file {shlex.quote(str(file.path))}"
                shows = f"`umbel data {shlex.quote(str(site_file))}{which}` shows them"
                refused, total = file.summary.refused, file.summary.examples
                setting = setting_of(config, adapter, name)
                found.append(DataError(f"{setting}: {refused:,} of {total:,} examples are refused; {shows}"))
            told |= {str(mistake): mistake for mistake in found}
    return list(told.values())


def _all_is_well(config: SiteConfig, surveyed: "Mapping[str, AdapterSurvey]") -> str:
    """Say in one line what the site will serve and train on."""
    parts = [f"ok: {config.site.name}", f"base {config.model.served_name} at {config.model.path}"]
    parts += [_adapter_is_well(config, name, survey) for name, survey in surveyed.items()]
    parts += [f"{section.name} served only" for section in config.serve]
    return ", ".join(parts)


def _adapter_is_well(config: SiteConfig, adapter: str, survey: "AdapterSurvey") -> str:
    """Say what an adapter will be trained and judged on."""
    from client.data.summary import HELD_OUT, guard_name

    files, sides = survey.files, survey.sides
    taken = {what: sum(getattr(one.summary, what) for one in files.values()) for what in ("cut", "dropped")}
    lost = f" ({taken['cut']:,} cut at seq_len, {taken['dropped']:,} of them left out)" if taken["cut"] else ""
    withheld = sum(sides.withheld.values())
    lost += f" ({withheld:,} are not trained on: held-out examples or guards ask the same)" if withheld else ""
    return ", ".join(
        [
            f"adapter {adapter}",
            f"{len(sides.train):,} training and {sides.asked[HELD_OUT].examples:,} held-out examples{lost}",
            *(
                f"guard {guard.name} with {sides.asked[guard_name(guard.name)].examples:,}"
                for guard in config.policy(adapter).guard
            ),
        ]
    )


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
        reply = ask(SiteConfig.load(site_file), "POST", f"/adapters/{adapter}/rollback{forced}")
        say(f"{adapter}: {reply['live'] or 'the base'} answers users again; once more would take this back")


def promote(site_file: SiteFile, ref: Annotated[str, typer.Argument(help="Such as support@v3.")]) -> None:
    """Let a judged shadow answer users, even against this site's verdict; the federation cannot do the latter."""
    with explained():
        ask(SiteConfig.load(site_file), "POST", f"/adapters/{AdapterRef.parse(ref)}/promote?forced=true")
        print(f"{ref} answers users; back: umbel rollback {site_file} {AdapterRef.parse(ref).name}")


def _status(config: SiteConfig) -> dict[str, Any]:
    """Return the daemon's status; if no daemon runs, the status read from its journal.

    Raises ConfigError where no daemon runs and there is no journal.
    """
    try:
        return ask(config, "GET", "/status")
    except NoDaemon as nobody:
        with part_of("site"):
            from client import journal_view
        try:
            return journal_view.without_daemon(config)
        except FileNotFoundError:
            raise nobody from None
