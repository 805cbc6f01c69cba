"""The demo: a federation of sites that serve users while they learn, on one machine, every part real.

    scripts/demo [--base tiny|real] [--four-bit [all|one]] [--adapters 1|2] [--sites 2] [--rounds 3] [--out DIR]
                 [--insecure]

With `--base real` the sites serve SmolLM2-135M-Instruct and learn invented facts of a clinic and of a shop, in English;
the demo then ends with their answers before and after. With `--four-bit` the base is packed first, and every site
serves and trains on its 4-bit weights; with `--four-bit one` only the first site does, and the run mixes both kinds.

With `--adapters 2` every site has two adapters with data of their own, `support` and `billing`, and two runs train them
at the same time, over the same SuperNodes and in one registry, while users ask for both and for the base. The exit
status is then 0 only if no request failed or was answered by another tenant's adapter, and both adapters end with a
promoted version.

It runs with TLS, with SuperNodes that are known by their keys, and with signed orders, versions and updates; with
`--insecure` it runs without all of these. The exit status is 0 only if no user's request failed, every round was
promoted, or rejected or idle for a stated reason, and the federated adapter beats the base on both tasks; with the real
base also in the answers to the questions that it shows.
"""

import argparse
import shutil
import signal
import sys
from pathlib import Path

from scripts.tools.repository import REPOSITORY

MARKER = ".umbel-demo"
"""File by which a folder is known as that of an earlier demo, which the next one may empty."""


def main() -> int:
    """Parse the options, run the demo, and clean up whatever happens; return the exit status."""
    options = parse()
    # Imported after the options are read: `--help` answers with Python alone, before there is an environment.
    from scripts.tools.processes import ProcessError, Processes

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)  # also where a shell had SIGINT ignored
    out = fresh_folder(options.out)
    processes = Processes(out / "logs")
    demo = None
    try:
        from scripts.tools.demo.adapters import TwoAdapters  # takes seconds, in which Ctrl-C is answered already
        from scripts.tools.demo.run import Demo
        from scripts.tools.demo.settings import SETTINGS

        setting = SETTINGS[options.base]
        demo = (Demo if options.adapters == 1 else TwoAdapters)(
            out, options.sites, options.rounds, processes,
            secure=options.secure, setting=setting, four_bit=options.four_bit,
        )  # fmt: skip
        return demo.run()
    except ProcessError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopping", file=sys.stderr)
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not stop the cleaning up
        if demo is not None:
            demo.stop_users()
        processes.stop()


def interrupt(number: int, frame: object) -> None:
    """Turn a signal into KeyboardInterrupt: SIGTERM and SIGHUP end the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def parse() -> argparse.Namespace:
    """Parse the command line; end with a message where the numbers make no demo."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", choices=("tiny", "real"), default="tiny",
        help="tiny: trained here, 5 minutes in all (default); real: SmolLM2-135M-Instruct, up to 30 minutes",
    )  # fmt: skip
    parser.add_argument(
        "--four-bit", choices=("all", "one"), nargs="?", const="all",
        help="pack the base in 4 bits for all sites (default), or for the first one only, with mixed-bases=true",
    )  # fmt: skip
    parser.add_argument(
        "--adapters", type=int, choices=(1, 2), default=1, help="adapters of each site, each with a run of its own"
    )
    parser.add_argument("--sites", type=int, default=2, help="SGLang servers, about 4 GB each (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the federation (default 3)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "demo-out", help="where logs and results go")
    parser.add_argument("--secure", action="store_true", default=True, help="with make_certs' keys (default)")
    parser.add_argument("--insecure", dest="secure", action="store_false", help="no TLS, no keys, no signatures")
    options = parser.parse_args()
    if not 2 <= options.sites <= 8 or options.rounds < 1:
        parser.error("--sites must be 2 to 8, and --rounds at least 1")
    return options


def fresh_folder(out: Path) -> Path:
    """Make `out` an empty folder and return it resolved: an earlier demo's is emptied, any other one is refused."""
    out = out.resolve()
    if len(str(out)) > 60:
        sys.exit(f"demo: {out} is too long a path for the Unix sockets below it; choose a shorter --out")
    if out.exists() and not out.is_dir():
        sys.exit(f"demo: {out} is a file; choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        sys.exit(f"demo: {out} is not empty and not a demo's; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    (out / MARKER).touch()
    return out


if __name__ == "__main__":
    sys.exit(main())
