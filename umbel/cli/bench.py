"""`umbel bench …`: measure a site's co-execution of serving and training against baselines, on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from umbel.cli.console import calls, explained, part_of
from umbel.site.check import check_files
from umbel.site.config import SiteConfig
from umbel.site.sections import TrainingSection
from umbel.site.slow_dtype import slow_dtype

if TYPE_CHECKING:  # the command imports it when it needs it
    from serving.bench.world import World

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure serving and training together, on this machine.",
    epilog=calls(
        "umbel bench coexec --smoke",
        "umbel bench coexec clinic-a.toml --load gamma:4 --window 60",
        "umbel bench report --out bench-out",
        "umbel bench simulate --rate 2",
    ),
)

Out = Annotated[Path, typer.Option(help="Folder of the run: a JSON line per block, adapters, tables, plots.")]
Trace = Annotated[
    Path | None, typer.Option(help="CSV of the Azure LLM inference traces. Default: lengths fitted to one.")
]
Docs = Annotated[Path | None, typer.Option(help="A Markdown page whose generated part is written again.")]
CACHE = Path("~/.cache/umbel")
DEFAULTS = TrainingSection.model_fields


@bench_app.command()
def coexec(
    site_file: Annotated[
        Path | None,
        typer.Argument(
            help="A site file: measure its base, data and [slo]. Default: a tiny base of the benchmark's own."
        ),
    ] = None,
    out: Out = Path("bench-out"),
    trace: Trace = None,
    load: Annotated[
        str,
        typer.Option(
            help="Gaps between requests: trace, poisson, or gamma:CV, such as gamma:4 for bursts. CV is their "
            "coefficient of variation."
        ),
    ] = "trace",
    window: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds of a block. Default: 11; a slow base needs some steps in each."),
    ] = None,
    docs: Docs = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Five systems, one round: about three minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in this folder.")] = False,
    cache: Annotated[Path, typer.Option(help="Where the benchmark's tiny base is kept.")] = CACHE,
) -> None:
    """Measure umbel and eight baselines on one engine under one load, as in docs/benchmarks.md; at most 75 minutes.

    A site's own engine must not run meanwhile; its state is not touched.
    """
    with explained():
        with part_of("site"):
            from serving.bench import coexec as bench
            from serving.bench.pages import report as tables
            from serving.bench.trace import ArrivalProcess
        config = SiteConfig.load(site_file) if site_file else None
        if config is not None:
            check_files(config)
        order = bench.Order(trace, ArrivalProcess.parse(load), smoke, resume, window)
        bench.run(out, order, lambda: _world(config, out.absolute(), cache.expanduser()), _say)
        print(tables.write(out, docs))


def _world(config: SiteConfig | None, out: Path, cache: Path) -> "World":
    """Return a site's base and its first adapter's prepared data; without a site the benchmark's own."""
    from serving.bench import domain
    from serving.bench.world import World

    if config is None:
        return domain.build(cache, domain.Recipe(), _say)
    from client.data.prepare import Preparation, prepare

    if (slow := slow_dtype(config)) is not None:
        _say(slow)
    training, adapter = config.training, config.adapters[0]
    prepared = prepare(
        Preparation(
            data=config.data(adapter),
            eval_data=config.eval_data(adapter),
            eval_fraction=training.eval_fraction,
            model=config.model.path,
            seq_len=training.seq_len,
            into=out / "data",
        )
    )
    _say(f"{config.site.name}: {prepared.train_examples} training and {prepared.eval_examples} held-out examples")
    return World.of_site(config, prepared.train, prepared.eval, out / "world")


@bench_app.command()
def report(out: Out = Path("bench-out"), docs: Docs = None) -> None:
    """Write the tables and plots of a run, even of one that has not ended."""
    with explained():
        with part_of("site"):
            from serving.bench.pages import report as tables
        print(tables.write(out, docs))


@bench_app.command()
def simulate(
    trace: Trace = None,
    preset: Annotated[str, typer.Option(help="The machine: cpu or gpu.")] = "cpu",
    rate: Annotated[float, typer.Option(help="Requests per second and site, on average.")] = 4.0,
    hours: Annotated[float, typer.Option(help="Simulated time.")] = 1.0,
    sites: Annotated[int, typer.Option(help="Number of sites; each begins at another hour of the trace.")] = 1,
    slo: Annotated[str | None, typer.Option(help="TTFT,TPOT in ms, such as 500,50. Default: strict targets.")] = None,
    share_floor: Annotated[float, typer.Option(help="As in the site file.")] = DEFAULTS["share_floor"].default,
    share_cap: Annotated[float, typer.Option(help="As in the site file.")] = DEFAULTS["share_cap"].default,
    seed: Annotated[int, typer.Option(help="Seed of the noise in the latencies.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Simulate how much training fits under the latency targets: hours of load in seconds, on a virtual clock."""
    with explained():
        with part_of("site"):
            from serving.bench.simulate import simulate_command
        print(
            simulate_command(
                trace, preset=preset, rate=rate, hours=hours, sites=sites, slo=slo, share_floor=share_floor,
                share_cap=share_cap, seed=seed, out=out,
            )
        )  # fmt: skip


def _say(text: str) -> None:
    print(text, flush=True)
