"""`worths`: how much the rounds of each adapter bring for their time, beside those of the site's other adapters.

Not every update is worth training (MACE, arXiv 2510.03283): an adapter whose last rounds lowered the held-out loss more
for each second of training gets more of the next ones. Everything comes from the journal.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from client.rounds.journal import RoundJournal, lineage_of
from umbel.adapter import AdapterManifest
from umbel.messages import RoundReport, ShadowReport

LEAST, MOST = 0.1, 10.0
"""Bounds: an adapter that brings nothing still trains, so that it can show that this has changed."""
SHORTEST_S = 1e-3
"""Less than any round takes, so that a gain by its time is a number."""
WEIGHT = 0.5
"""Part of the latest round in the running means."""


@dataclass(frozen=True)
class Brought:
    """The gain and the time of one round of training at this site."""

    gain: float
    """Held-out loss of the incumbent minus that of the version that the round led to, in nats per token."""
    seconds: float
    """Time of the device that the round took here."""


def worths(rounds: Mapping[str, Sequence[Brought]]) -> dict[str, float]:
    """Return for each adapter the gain per second of its rounds over the mean of all adapters, within `LEAST`..`MOST`.

    `rounds` are in order, oldest first. An adapter without a judged round counts as the mean, and so do all where none
    has gained anything.

    >>> worths({"support": [Brought(0.2, 10.0)], "triage": [Brought(0.1, 10.0)], "billing": []})
    {'support': 1.33..., 'triage': 0.66..., 'billing': 1.0}
    """
    rates = {adapter: _rate(brought) for adapter, brought in rounds.items()}
    known = [rate for rate in rates.values() if rate is not None]
    mean = sum(known) / len(known) if known else 0.0
    return {
        adapter: 1.0 if rate is None or not mean else min(MOST, max(LEAST, rate / mean))
        for adapter, rate in rates.items()
    }


def brought(rounds: RoundJournal, versions: Iterable[tuple[AdapterManifest, ShadowReport]]) -> list[Brought]:
    """Return what an adapter's versions, in order, brought for the time of the rounds that this site trained for them.

    Versions that were not measured are left out, and those for which nothing was trained here.
    """
    trained = {(lineage_of(order), order.round): report for order, report in rounds.done()}
    found = []
    for manifest, report in versions:
        round_, gain = trained.get((manifest.lineage, manifest.round)), _gain(report)
        if round_ is not None and gain is not None:
            found.append(Brought(gain, _device_seconds(round_)))
    return found


def _rate(rounds: Sequence[Brought]) -> float | None:
    """Return the running mean of the gains over that of the seconds, at least 0; None where nothing is known."""
    if not rounds:
        return None
    gain, seconds = rounds[0].gain, rounds[0].seconds
    for one in rounds[1:]:
        gain += WEIGHT * (one.gain - gain)
        seconds += WEIGHT * (one.seconds - seconds)
    return max(0.0, gain) / max(seconds, SHORTEST_S) if seconds > 0 else None


def _gain(report: ShadowReport) -> float | None:
    """Return how much lower the loss of a version was than the incumbent's; None where that was not measured."""
    shadow, incumbent = report.probe.get("shadow"), report.probe.get("live") or report.probe.get("base")
    if shadow is None or incumbent is None:
        return None
    gain = incumbent.loss - shadow.loss
    return gain if abs(gain) < float("inf") else None


def _device_seconds(report: RoundReport) -> float:
    return report.seconds * report.share
