"""Whether one version serves users worse than another: errors, latency, ratings, and what a mirror saw.

Each is a one-sided test of its own. Counts (errors, ratings, empty answers): Fisher's exact test, which holds for the
few that a canary sees. Latencies: the Mann-Whitney U test against `max_latency_ratio` times those of the other version;
it asks for no distribution, and a few slow requests do not decide it.

Traffic is looked at while it comes in, and whoever looks often enough finds what is not there. So looks are taken at
doubled numbers of requests and ratings, and the k-th may err with probability α / 2^k: all together stay below α (a
Bonferroni bound over the looks; for such tests Jennison and Turnbull, Group Sequential Methods, 2000).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import fisher_exact, mannwhitneyu

from serving.traffic_report import MirrorTraffic, VersionTraffic
from umbel.site_sections import ShadowSection

FIRST_LOOK = 8
"""Requests and ratings before the first look."""


@dataclass(frozen=True)
class Finding:
    """What traffic says of a version."""

    worse: bool
    reasons: tuple[str, ...]
    """In words, what decided first."""


class Looks:
    """When to look, and with which probability a look may find what is not there."""

    def __init__(self, confidence: float) -> None:
        self._alpha = (1 - confidence) / 2  # of the two-sided interval, as all of [shadow] is read
        self._next = FIRST_LOOK

    def due(self, seen: int) -> bool:
        return seen >= self._next

    def spend(self, seen: int) -> float:
        """Look now, with so much seen; the probability of a false alarm that this look has."""
        while self._next <= seen:
            self._next *= 2
        self._alpha /= 2
        return self._alpha


def compare(
    new: VersionTraffic, now: VersionTraffic, who: str, policy: ShadowSection, alpha: float,
    mirror: MirrorTraffic | None = None,
) -> Finding:  # fmt: skip
    """The version `new` against `now`, which reasons call `who`; `alpha` is the probability of a false alarm."""
    found = [
        _share("errors", (new.errors, new.requests), (now.errors, now.requests), who, alpha),
        _share("bad ratings", (new.down, new.down + new.up), (now.down, now.down + now.up), who, alpha),
        _slower("first token", new.ttft_s, now.ttft_s, who, policy.max_latency_ratio, alpha),
        _slower("next token", new.tpot_s, now.tpot_s, who, policy.max_latency_ratio, alpha),
    ]
    if mirror is not None and mirror.compared + mirror.failed:
        asked = mirror.compared + mirror.failed
        lost = (mirror.empty + mirror.failed, asked)
        found.append(_share("mirrored requests without an answer", lost, (mirror.live_empty, asked), who, alpha))
        found.append((False, _in_passing(mirror, who)))
    found.sort(key=lambda finding: not finding[0])
    return Finding(any(worse for worse, _ in found), tuple(reason for _, reason in found if reason))


def _share(what: str, new: tuple[int, int], now: tuple[int, int], who: str, alpha: float) -> tuple[bool, str]:
    """Whether a share, given as (those, all), is higher; nothing is said where there is nothing to compare."""
    if not new[1]:
        return False, ""
    (bad, total), (bad_now, total_now) = new, now
    table = [[bad, total - bad], [bad_now, total_now - bad_now]]
    worse = bool(total_now) and float(fisher_exact(table, alternative="greater").pvalue) < alpha
    word = "more, with confidence" if worse else "not clearly more"
    return worse, f"{what}: {bad} of {total} against {who}'s {bad_now} of {total_now}: {word}"


def _slower(
    what: str, new: Sequence[float], now: Sequence[float], who: str, ratio: float, alpha: float
) -> tuple[bool, str]:
    if not new or not now:
        return False, ""
    scaled = [ratio * seconds for seconds in now]
    worse = float(mannwhitneyu(new, scaled, alternative="greater").pvalue) < alpha
    word = "slower, with confidence" if worse else "not clearly slower"
    return worse, (
        f"{what} after {1000 * _median(new):.0f} ms against {ratio:g} × {who}'s {1000 * _median(now):.0f} ms: "
        f"{word}, {len(new)} and {len(now)} streams"
    )


def _in_passing(mirror: MirrorTraffic, who: str) -> str:
    """What says that a version is other, not that it is worse."""
    if not mirror.compared:
        return ""
    longer = f", {mirror.words / mirror.live_words:.2f} × as long" if mirror.live_words else ""
    return (
        f"mirror: {mirror.agreement / mirror.compared:.1%} of the leading words as {who}'s{longer}, refusals "
        f"{mirror.refusals} against {mirror.live_refusals}, {mirror.compared} requests"
    )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
