"""`show`: the site's status on one screen: live versions, since when and why, candidates, and the way back."""

import shlex
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from umbel.adapter import ServedRef
from umbel.printable import values

Report = dict[str, Any]
Row = tuple[str, Text]
"""(label, text)."""

NO_ROOM = 0.005
"""Share of the time below which training counts as held up."""


def show(report: Report, site_file: str, *, now: float, console: Console | None = None) -> None:
    """Print the answer of GET /status at the Unix time `now`: in colours on a terminal, plain elsewhere.

    Any width from 60 columns on will do.
    """
    console = console or Console(highlight=False)
    report = values(report)  # sites, the centre and SGLang wrote parts of it
    console.print(Text.assemble((report["site"], "bold"), ": ", _engine(report, site_file, now)))
    console.print(grid(_now(report)))
    for adapter in report["aliases"]:
        console.print()
        console.print(Text.assemble((adapter, "bold"), ": ", _answers(report, adapter, now)))
        console.print(grid(_versions(report, adapter, site_file)))


def _served(report: Report) -> Text:
    """Name the adapters that are only served, with their weights."""
    named = ", ".join(str(ServedRef.of(one["name"], one["digest"])) for one in report["served"])
    return Text(f"{named}; never trained")


def grid(rows: Iterator[Row]) -> Table:
    """Return rows as a table of labels and texts without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=11)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(f"  {label}", text)
    return table


def _now(report: Report) -> Iterator[Row]:
    """Yield the rows about the site as a whole."""
    if report["running"]:
        in_flight = [f"{count} by {version}" for version, count in sorted(report["in_flight"].items())]
        yield "answering", Text(", ".join(in_flight) or "no request")
        yield "latency", Text(_latency(report["training"] or {}))
        yield "training", _training(report)
        if kept := (report["training"] or {}).get("reserved_mb"):
            tokens = report["training"]["kv_tokens_given_up"]
            yield "memory", Text(f"{kept:,} MB are kept for training, {tokens:,} tokens of KV cache")
    if report["served"]:
        yield "served", _served(report)
    yield "rounds", Text(f"waiting or running: {', '.join(report['open_rounds']) or 'none'}")
    if report.get("recovered"):
        yield "recovered", Text("\n".join(report["recovered"]), "yellow")


def _engine(report: Report, site_file: str, now: float) -> Text:
    engine = report["engine"]
    if not report["running"]:
        command = f"umbel serve {shlex.quote(site_file)}"
        return Text.assemble(("not running", "bold red"), f"; this is what its journal says. To start it: {command}")
    if not engine["ready"]:
        return Text.assemble(("engine starting", "bold yellow"), "; users get no answer until it is ready")
    starts = f", start {engine['starts']}" if engine["starts"] > 1 else ""
    since = _since(engine["since"], now)
    return Text.assemble(("engine ready", "bold green"), f" at {engine['url']}, since {since}{starts}")


def _answers(report: Report, adapter: str, now: float) -> Text:
    live, since = report["aliases"][adapter]["live"], report["answering"][adapter]["since"]
    verb = "answers" if report["engine"]["ready"] else "will answer"
    return Text.assemble(
        (live or "the base", "bold green"), f" {verb} users{f', since {_since(since, now)}' if since else ''}"
    )


def _versions(report: Report, adapter: str, site_file: str) -> Iterator[Row]:
    """Yield the rows about one adapter."""
    aliases = report["aliases"][adapter]
    bad = report["versions"].get(aliases["previous"], {}).get("taken_back")
    why = _why(report, aliases["live"], report["answering"][adapter]["event"])
    yield "why", Text(f"{aliases['previous']} was rolled back by itself: {bad}; {why}" if bad else why)
    for alias, ref in aliases.items():
        if alias not in ("live", "previous") and ref:
            yield alias, Text(f"{ref} {_judged(report, ref)}")
    looks = report["heldout_looks"].get(adapter)  # none without a daemon, which knows the examples
    if looks and looks["verdicts"]:
        yield "looks", _looks(looks)
    if adapter in report["data"]:  # without a daemon nothing is known of it
        yield "data", _data(report["data"][adapter])
    if adapter in report["worth"]:
        yield "worth", Text(report["worth"][adapter])
    if len(report["training_shares"]) > 1:
        yield "share", Text(_share(report["training_shares"], adapter))
    if aliases["previous"] or aliases["live"]:
        command = f"umbel rollback {shlex.quote(site_file)} {adapter}{' --force' if bad else ''}"
        yield "go back", Text(f"to {aliases['previous'] or 'the base'}: {command}")
    backs = [f"{_date(at)} {adapter}@v{version} {event}" for at, event, version in report["roll_backs"][adapter]]
    if backs:
        yield "went back", Text("\n".join(backs))


def _why(report: Report, live: str | None, event: str | None) -> str:
    if live is None:
        return event or "no version was promoted yet"
    verdict = report["versions"].get(live, {}).get("verdict")
    return f"{event or 'promoted'}; {_reason(verdict)}" if verdict else event or "promoted"


def _judged(report: Report, ref: str) -> str:
    version = report["versions"].get(ref, {})
    verdict = version.get("verdict")
    state = version.get("state", "unknown")
    return f"{state}: {verdict['decision']}; {_reason(verdict)}" if verdict else f"{state}, no verdict yet"


def _reason(verdict: Report) -> str:
    """Return the reason with the loss and its interval; without one, the deciding reason, which comes first."""
    reasons: list[str] = verdict["reasons"] or ["no reason given"]
    return next((reason for reason in reasons if reason.startswith("held-out loss")), reasons[0])


def _looks(looks: Report) -> Text:
    """Say how often versions were judged by the same held-out examples, and what that costs the next one."""
    since, verdicts = looks["since_promotion"], looks["verdicts"]
    in_all = f", {verdicts} in all" if verdicts != since else ""
    asked = f"the next verdict promotes at p = {looks['next_level']:.1g} or less"
    text = Text(f"{since} at the held-out examples since a promotion{in_all}; {asked}")
    return text.append("; renew them", "yellow") if looks["due"] else text


def _latency(training: Report) -> str:
    slo = training.get("slo")
    if not slo:
        return "no targets yet; training is for idle time until they are known"
    per_token = slo.get("ttft_ms_per_token", 0.0)
    prompt = f" and {per_token:.3g} ms per prompt token" if per_token else ""
    targets = f"targets: {slo['ttft_ms']:.0f} ms{prompt} to the first token, {slo['tpot_ms']:.1f} ms per later one"
    answered, met = slo.get("answered", 0), slo.get("met", 0)
    share = f"met by {met / answered:.1%} of {answered} requests" if answered else "no request answered yet"
    debt = f"; {slo['debt_s']:.1f} s were trained against them (share_floor)" if slo["debt_s"] else ""
    return f"{targets}; {share}, {slo['quantile']:.0%} is promised{debt}"


def _training(report: Report) -> Text:
    training: Report = report["training"] or {}
    rounds: Report = report["running_rounds"]
    if not rounds:
        return Text.assemble(("paused", "yellow"), f": {_paused(report, training)}")
    lines = [f"{adapter}/{running['key']}: {_progress(running)}" for adapter, running in rounds.items()]
    if "quanta" not in training:  # the engine does not say
        return Text("\n".join(lines))
    quanta = sum(kind["count"] for kind in training["quanta"].values())
    lines[-1] += f"; {quanta} quanta, the longest {1000 * training['longest_quantum_s']:.1f} ms (P99)"
    text = Text("\n".join(lines))
    if all(running["share"] < NO_ROOM for running in rounds.values()):
        reason = (
            "the latency targets leave no room now"
            if training["latency_known"] and training["slo"]
            else "only while nobody is served, until the engine's latency is known"
        )
        text.append("\nheld up", "yellow").append(f": {reason}")
    return text


def _progress(running: Report) -> str:
    share, seconds = running["share"], running["seconds"]
    speed = f", {running['num_loss_tokens'] / seconds:.0f} tokens/s" if running["num_loss_tokens"] and seconds else ""
    return f"{running['steps']} steps, {share:.0%} of the time{speed}"


def _share(shares: Report, adapter: str) -> str:
    """Say which part of the training an adapter gets while all have rounds, and why."""
    parts = {name: one["share"] * one["worth"] for name, one in shares.items()}
    one = shares[adapter]
    due = parts[adapter] / sum(parts.values())
    return f"{due:.0%} of the training while all train: share {one['share']:g} × {one['worth']:.2g} for what it brought"


def _data(data: Report) -> Text:
    """Say what the daemon has prepared, and what of it will bite."""
    taken = {"cut at seq_len": data["cut"], "left out": data["dropped"], "answers without a loss": data["untold"]}
    taken |= {"not trained on, because held-out examples or guards ask the same": data["withheld"]}
    told = [f"{data['train']:,} examples to train on, {data['held_out']:,} held out"]
    text = Text(", ".join([*told, *(f"{count:,} {what}" for what, count in taken.items() if count)]))
    for sentence in data["will_bite"]:
        text.append("\nwill bite", "yellow").append(f": {sentence}")
    if data["refused"]:
        text.append("\nrefused", "red").append(f": {data['refused']}; the data of before stays in use")
    if data["rounds_wait"]:
        text.append("\nrounds wait", "yellow").append(": an example that a user had deleted is in the data of before")
    return text


def _paused(report: Report, training: Report) -> str:
    """Say why nothing is trained now."""
    if not report["engine"]["ready"]:
        return "the engine is starting"
    if training.get("error") and not training.get("job"):
        return str(training["error"])
    if report["open_rounds"]:
        return f"{report['open_rounds'][0]} is about to begin"
    last = f"; the last job, {training['job']}, is {training['state']}" if training.get("job") else ""
    return f"no round is open{last}{': ' + training['error'] if training.get('error') else ''}"


def _since(at: float, now: float) -> str:
    """Format a Unix time and how long ago it was."""
    seconds = max(0, int(now - at))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    long = f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{_date(at)} ({long if seconds >= 60 else f'{seconds} s'})"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
