"""What became of each round, told from manifests, alias moves and events: for an index that has to be made anew."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.registry.alias_log import LIVE, AliasLog
from server.registry.round_log import RoundLog, RoundState
from umbel.adapter import AdapterManifest

EVENTS = "events.jsonl"
_FINAL = {
    "round.promoted": RoundState.PROMOTED,
    "round.rejected": RoundState.REJECTED,
    "round.failed": RoundState.FAILED,
}


def recover(
    rounds: RoundLog, root: Path, versions: list[AdapterManifest], known: set[tuple[str, int]]
) -> list[str]:  # fmt: skip
    """Record the rounds of one adapter that are not `known`; what cannot be told, in words.

    A version without a verdict counts as judged when a later one was published, for rounds follow one another; the
    newest one will be judged again.
    """
    name, lost = versions[0].name, []
    started: set[int] = set()
    for event in _events(root / EVENTS, name):
        number, kind = event["round"], event["event"]
        if (name, number) in known:
            continue
        if kind in _FINAL:
            rounds.record(
                name, number, event.get("run_id", ""), _FINAL[kind], version=event.get("version"),
                reasons=event.get("reasons"),
            )  # fmt: skip
        elif kind == "round.started":
            started.add(number)
    lived = {move.to.get(LIVE) for move in AliasLog(root / name / "aliases.jsonl").moves()}
    for manifest in versions:
        record = rounds.find(name, manifest.round)
        if record is None or record.state.final or (name, manifest.round) in known:
            continue
        if manifest.version in lived:
            rounds.record(name, manifest.round, manifest.run_id, RoundState.PROMOTED)
        elif manifest is not versions[-1]:
            why = {"*": "not promoted; the index was made anew, and its verdict is not in the files"}
            rounds.record(name, manifest.round, manifest.run_id, RoundState.REJECTED, reasons=why)
    lost += [
        f"round {number} of {name} was under way; the next run begins it again"
        for number in sorted(started)
        if rounds.find(name, number) is None
    ]
    if len(versions) > 1 and not known and not (root / EVENTS).is_file():
        lost.append(f"{root / EVENTS} is missing: rounds of {name} that failed, and verdicts' reasons, are not known")
    return lost


def _events(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The events of an adapter's rounds; a line cut short by a kill is passed over."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("adapter") == name and isinstance(event.get("round"), int):
            yield event
