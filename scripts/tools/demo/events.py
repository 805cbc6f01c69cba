"""Turns the registry's events into the demo's lines and tables, and checks what the demo promises."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.tools.demo.answers import no_better

ENDS = {
    "round.promoted": "promoted", "round.rejected": "rejected", "round.failed": "failed", "round.idle": "idle",
}  # fmt: skip
SHOWN = (
    "run.started", "round.started", "site.trained", "site.skipped", "round.published", "site.judged", "round.promoted",
    "round.rejected", "round.failed", "round.idle", "run.finished",
)  # fmt: skip


def describe(event: dict[str, Any]) -> str:
    """Return the line that the demo prints for an event of a kind in `SHOWN`."""
    kind, number = event["event"], event.get("round", "")
    match kind:
        case "run.started":
            return f"flwr run: {event['rounds']} rounds, strategy {event['strategy']}"
        case "round.started":
            return f"round {number}: {', '.join(event['sites'])} train, beginning with {event['parent'][:12]}"
        case "site.trained":
            share = f"{event['share']:.0%} of {event['seconds']:.0f} s went into training, the rest into serving"
            return f"round {number}: {event['site']} took {event['steps']} steps; {share}"
        case "site.skipped":
            return f"round {number}: {event['site']} does not train: {event['reason']}"
        case "round.idle":
            return f"round {number}: {event['reasons']['*']}"
        case "round.published":
            lost = f"{event['change_error']:.0%} of what the round changed is beyond its rank"
            return f"round {number}: published {event['adapter']}@v{event['version']} ({lost} in the worst module)"
        case "site.judged":
            verdict = event["verdict"] or {"reasons": ["no verdict"]}
            return f"round {number}: {event['site']} judges the shadow: {'; '.join(verdict['reasons'])}"
        case "round.promoted":
            return f"[bold]round {number}: v{event['version']} answers users at {', '.join(event['sites'])}[/bold]"
        case "run.finished":
            return f"the run is over; {event['head']} is where the next one would begin"
        case _:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in event.get("reasons", {}).items())
            return f"[red]round {number}: {ENDS[kind]}[/red] {reasons}"


def probe_row(event: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the probes' table from a `site.judged` event: losses per token by role, and the verdict."""
    losses = {role: e["loss_sum"] / e["loss_tokens"] for role, e in event["probe"].items() if e["loss_tokens"]}
    verdict = event["verdict"] or {"accepted": False, "reasons": ["no verdict"]}
    return {
        "round": event["round"], "version": event["ref"], "site": event["site"], **losses,
        "verdict": "accepted" if verdict["accepted"] else "; ".join(verdict["reasons"]),
    }  # fmt: skip


def round_row(event: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the rounds' table from the event that ended a round."""
    return {
        "round": event["round"], "end": ENDS[event["event"]], "seconds": event.get("seconds", {}),
        "messages": event.get("messages", {}),
        "reasons": event.get("reasons", {}),
    }  # fmt: skip


def not_answered(users: Mapping[str, Any]) -> list[str]:
    """Return a line for each group of users of which a request failed, or that asked nothing."""
    broken = []
    for who, found in users.items():
        if found["failed"]:
            broken.append(f"{who}: {found['failed']} of {found['requests']} requests failed: {found['failures'][0]}")
        if not found["requests"]:
            broken.append(f"{who}: no user was answered")
    return broken


def without_an_end(rows: Sequence[Mapping[str, Any]], rounds: int) -> list[str]:
    """Return a line unless that many rounds were promoted, or rejected or idle for a stated reason."""
    ended = [row for row in rows if row["end"] == "promoted" or (row["end"] in ("rejected", "idle") and row["reasons"])]
    if len(ended) >= rounds:
        return []
    return [f"only {len(ended)} of {rounds} rounds were promoted, or rejected or idle for a stated reason"]


def broken_promises(summary: dict[str, Any], rounds: int) -> list[str]:
    """Return a line for each promise of the demo that was not kept; empty if all were."""
    broken = [*not_answered(summary["users"]), *without_an_end(summary["rounds"], rounds)]
    live = {site["live"] for site in summary["sites"].values()}
    federated = summary["quality"].get(next(iter(live)) or "") if len(live) == 1 else None
    if federated is None:
        return [*broken, f"the sites do not serve one federated version: {sorted(map(str, live))}"]
    for task, score in federated.items():
        base = summary["quality"]["base"][task]
        if not (score["loss"] < base["loss"] and score["exact_match"] >= base["exact_match"]):
            broken.append(f"the federated adapter does not beat the base on the {task} task: {score} against {base}")
    return broken + no_better(summary["answers"])
