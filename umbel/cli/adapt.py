"""`umbel adapt`: one site alone trains, judges and promotes in rounds, without Flower; in the site's environment."""

import logging
import secrets
import signal
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from umbel.cli.adapt_screen import AdaptScreen
from umbel.cli.console import SiteFile, adapter_of, calls, explained, part_of
from umbel.cli.daemon import OwnDaemon
from umbel.errors import ConfigError
from umbel.printable import one_line
from umbel.signing import read_private
from umbel.site.check import check_files
from umbel.site.config import SiteConfig
from umbel.site.daemon_lock import daemon_runs
from umbel.site.slow_dtype import slow_dtype

if TYPE_CHECKING:  # the command imports them when it needs them
    from server.config import RunConfig
    from server.registry.events import Events

EPILOG = calls(
    "umbel adapt clinic-a.toml",
    "umbel adapt clinic-a.toml --rounds 3 --set steps=80 --set learning-rate=0.004",
    "umbel adapt clinic-a.toml --adapter triage --registry /srv/umbel/registry",
)
REGISTRY = "registry"
"""Name of the folder in state_dir where versions are kept by default."""
OPTIONS = {"registry": "--registry", "adapter": "--adapter", "rounds": "--rounds"}
"""Key of the run configuration → the option that says it here."""
KEYS = frozenset({
    "round-seconds", "grace-seconds", "rank", "steps", "batch-size", "learning-rate", "schedule", "warmup-steps",
    "weight-decay", "clip-norm", "seed", "proximal", "signing-key",
})  # fmt: skip
"""Keys of the run configuration that mean something where one site is alone."""


def adapt(
    site_file: SiteFile,
    adapter: Annotated[
        str | None, typer.Option(help="The adapter that is trained; needed where a site has several.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="End after so many more rounds. Default: Ctrl-C.")] = None,
    registry: Annotated[
        Path | None, typer.Option(help="Directory of the versions. Default: registry in the site's state_dir.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the run configuration; may be repeated."),
    ] = None,
) -> None:
    """Adapt to the site's own examples, alone: train, judge the new version, promote it if it is better, and again.

    No Flower is needed. `umbel serve` is started, and ended at the end, unless it runs already. A round that was
    interrupted is taken up. `flwr run` with this registry goes on from its versions. Exit status 1 where --rounds were
    run and none of them made a version that was judged.
    """
    with explained(), _until_stopped():
        config = SiteConfig.load(site_file)
        name = adapter_of(config, adapter)
        if not daemon_runs(config.site.state_dir):
            check_files(config)
        given = _given(settings or [])
        run = _run_config(config, name, rounds, registry, given)
        if not _run(config, site_file, name, run, same_rank="rank" not in given):
            raise typer.Exit(1)


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the work inside, and the command with status 0."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        _tell("stopped; the same command goes on from here")


def _run_config(
    config: SiteConfig, adapter: str, rounds: int | None, registry: Path | None, given: dict[str, object]
) -> "RunConfig":
    """Return the configuration of the run; raise ConfigError with one line per mistake."""
    with part_of("site"):
        from server.config import ALONE, ENDLESS, RunConfig, defaults
        from server.registry.identity import absolute
    root = absolute(registry or config.site.state_dir / REGISTRY)
    most = config.max_rank(adapter)
    known = defaults()
    known |= {
        "registry": str(root.resolve()), "adapter": adapter,
        "rounds": rounds or ENDLESS, "strategy": ALONE, "quorum": 1, "rank": min(most, known["rank"]),
    }  # fmt: skip
    run = RunConfig.of({**known, **given})
    if run.rank > most:
        raise ConfigError(
            f"--set rank={run.rank}: this site serves {adapter} up to rank {most}; raise [engine].max_lora_rank (and "
            "[[adapter]].rank) and restart the site, or leave the rank out"
        )
    if config.trusted_key(adapter) is not None and run.signing_key is None:
        raise ConfigError(
            "[site].trusted_key: this site takes only what the owner of that key signs; give the private one with "
            "--set signing-key=FILE"
        )
    return run


def _given(settings: list[str]) -> dict[str, object]:
    """Read `KEY=VALUE`, each a value of TOML, or a text without quotation marks."""
    given: dict[str, object] = {}
    mistakes = []
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            mistakes.append(f"--set {setting}: write KEY=VALUE, such as steps=80")
        elif key in OPTIONS:
            mistakes.append(f"--set {setting}: say it with {OPTIONS[key]}")
        elif key in _federations():
            mistakes.append(f"--set {setting}: {key} is for a federation, and means nothing to one site alone")
        try:
            given[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            given[key] = text
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return given


def _federations() -> set[str]:
    from server.config import defaults

    return defaults().keys() - KEYS - OPTIONS.keys()


def _run(config: SiteConfig, site_file: Path, adapter: str, run: "RunConfig", *, same_rank: bool) -> bool:
    """Run the rounds; return False where all of them failed. `same_rank`: at the rank of the registry's versions."""
    from server.registry import run_lock
    from server.registry.index import explained as readable
    from server.registry.registry import HEAD, AdapterRegistry
    from server.registry.round_log import RoundState
    from umbel.site.calls import SiteCalls

    logging.getLogger("umbel").addHandler(logging.NullHandler())  # what matters of its log is told in words
    config.site.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = read_private(run.signing_key) if run.signing_key else None
    with (
        readable(run.registry),
        closing(AdapterRegistry(run.registry, create=True, key=key)) as registry,
        run_lock.exclusive(registry.root, adapter, 0.0),
        OwnDaemon(config, site_file, _tell) as daemon,
        SiteCalls(config.socket) as calls,
    ):
        from server.alone import Alone, Direct  # takes seconds, in which the daemon starts

        for lost in registry.lost:
            _tell(f"registry: {lost}")
        if same_rank and (pin := registry.pin(adapter)) is not None:
            run = run.model_copy(update={"rank": pin.rank})
        status = daemon.wait_ready()
        data = status["data"].get(adapter)  # a daemon that is older than the site file may not train it
        for told in (slow_dtype(config), *(data["will_bite"] if data else ())):
            if told:
                _tell(f"will bite: {told}")
        url = status["engine"]["url"]

        def head() -> str:
            version = registry.aliases(adapter)[HEAD].version
            return f"v{version}" if version else "the untrained adapter"

        screen = AdaptScreen(config, adapter, site_file, url, learning_rate=run.learning_rate, head=head)
        site = Direct(calls, adapter, look=daemon.require_alive)
        alone = Alone(run, registry, site, _shown(registry.root, screen), f"adapt-{secrets.token_hex(4)}")
        _tell(f"{config.site.name}: users of {adapter!r} are answered at {url}; versions are kept in {registry.root}")
        ends = []
        for record in alone.rounds():
            ends.append(record.state)
            if record.state is RoundState.FAILED and len(ends) < run.rounds:
                _tell(f"the next round begins in {alone.pause_s:.0f} s")
    return not ends or any(state is not RoundState.FAILED for state in ends)


def _shown(root: Path, screen: AdaptScreen) -> "Events":
    """Return the registry's events, of which people see the screen's lines."""
    from server.registry.events import EVENTS, Events

    class Shown(Events):
        def emit(self, event: str, **fields: object) -> None:
            super().emit(event, **fields)
            for line in screen.lines({"event": event, **fields}):
                _tell(line)

    return Shown(root / EVENTS)


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {one_line(line)}", flush=True)
