"""`umbel bench …`: measure a site's co-execution of serving and training against baselines, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from umbel.cli.console import calls, explained, part_of
from umbel.site.sections import TrainingSection

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure serving and training together, on this machine.",
    epilog=calls("umbel bench coexec --smoke", "umbel bench report --out bench-out", "umbel bench simulate --rate 2"),
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
    out: Out = Path("bench-out"),
    trace: Trace = None,
    docs: Docs = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Three systems, one round: about two minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in this folder.")] = False,
    cache: Annotated[Path, typer.Option(help="Where the benchmark's tiny base is kept.")] = CACHE,
) -> None:
    """Measure umbel and seven baselines on one engine under one load, as in docs/benchmarks.md; at most 85 minutes."""
    with explained():
        with part_of("site"):
            from serving.bench import coexec as bench
            from serving.bench import report as tables
        bench.run(out, trace, smoke=smoke, resume=resume, cache=cache.expanduser(), say=_say)
        print(tables.write(out, docs))


@bench_app.command()
def report(out: Out = Path("bench-out"), docs: Docs = None) -> None:
    """Write the tables and plots of a run, even of one that has not ended."""
    with explained():
        with part_of("site"):
            from serving.bench import report as tables
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
