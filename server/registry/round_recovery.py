"""Fill the round log of a rebuilt index from manifests, alias moves and events.

`server/registry/round_log.py` is the log itself; nothing here runs while the index is whole.
"""

from pathlib import Path

from server.registry.alias_log import LIVE, AliasLog
from server.registry.events import EVENTS, EventReader
from server.registry.round_log import RoundLog, RoundState
from umbel.adapter import AdapterManifest

_FINAL = {
    "round.promoted": RoundState.PROMOTED,
    "round.rejected": RoundState.REJECTED,
    "round.failed": RoundState.FAILED,
    "round.idle": RoundState.IDLE,
}


def recover(
    rounds: RoundLog, root: Path, versions: list[AdapterManifest], known: set[tuple[str, int]]
) -> list[str]:  # fmt: skip
    """Record the rounds of one adapter that are not `known`; return a line for each thing that is lost.

    A version without a verdict counts as rejected when a later one was published, since rounds follow one another; the
    newest version will be judged again.
    """
    name, lost = versions[0].name, []
    started: set[int] = set()
    for event in EventReader(root / EVENTS).read():
        number, kind = event.get("round"), event["event"]
        if event["adapter"] != name or not isinstance(number, int) or (name, number) in known:
            continue
        if kind in _FINAL:
            version, reasons = event.get("version"), event.get("reasons")
            rounds.record(
                name, number, str(event.get("run_id", "")), _FINAL[kind],
                version=version if isinstance(version, int) else None,
                reasons=reasons if isinstance(reasons, dict) else None,
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
    if any(manifest.round for manifest in versions) and not known and not (root / EVENTS).is_file():
        lost.append(f"{root / EVENTS} is missing: rounds of {name} that failed, and verdicts' reasons, are not known")
    return lost
