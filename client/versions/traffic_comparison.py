"""`compare`: test whether a candidate serves users worse than the incumbent, by errors, latency, ratings and mirror.

Each of these is a one-sided test of its own. Counts (errors, ratings, empty answers) take Fisher's exact test, which is
valid for the few requests that a canary sees. Latencies take the Mann-Whitney U test against `max_latency_ratio` times
those of the incumbent; it assumes no distribution, and a few slow requests do not decide it.

Traffic is tested repeatedly while it comes in, and repeated tests raise the probability of a false alarm. So looks are
taken at doubled numbers of requests and ratings, and the k-th may err with probability α / 2^k: all together stay below
α (a Bonferroni bound over the looks; see Jennison and Turnbull, Group Sequential Methods, 2000).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import fisher_exact, mannwhitneyu

from serving.traffic_report import MirrorTraffic, VersionTraffic
from umbel.site.sections import ShadowSection

FIRST_LOOK = 8
"""Number of requests and ratings before the first look."""


@dataclass(frozen=True)
class Finding:
    """A version's traffic compared with the incumbent's."""

    worse: bool
    reasons: tuple[str, ...]
    """In words, the deciding one first."""


class Looks:
    """Decides when to test the traffic, and gives each test its share of the probability of a false alarm."""

    def __init__(self, confidence: float) -> None:
        self._alpha = (1 - confidence) / 2  # of the two-sided interval, as all of [shadow] is read
        self._next = FIRST_LOOK

    def due(self, seen: int) -> bool:
        """Return True when `seen` requests and ratings are enough for the next look."""
        return seen >= self._next

    def spend(self, seen: int) -> float:
        """Take a look after `seen` requests and ratings; return the probability of a false alarm it may have."""
        while self._next <= seen:
            self._next *= 2
        self._alpha /= 2
        return self._alpha


def compare(
    candidate: VersionTraffic, incumbent: VersionTraffic, incumbent_name: str, policy: ShadowSection, alpha: float,
    mirror: MirrorTraffic | None = None,
) -> Finding:  # fmt: skip
    """Test whether the candidate serves users worse than the incumbent.

    `alpha` is the probability of a false alarm; `incumbent_name` stands for the incumbent in the reasons.
    """
    name, ratio = incumbent_name, policy.max_latency_ratio
    rated, rated_before = candidate.down + candidate.up, incumbent.down + incumbent.up
    found = [
        _share("errors", (candidate.errors, candidate.requests), (incumbent.errors, incumbent.requests), name, alpha),
        _share("bad ratings", (candidate.down, rated), (incumbent.down, rated_before), name, alpha),
        _slower("first token", candidate.ttft_s, incumbent.ttft_s, name, ratio, alpha),
        _slower("next token", candidate.tpot_s, incumbent.tpot_s, name, ratio, alpha),
    ]
    if mirror is not None and mirror.compared + mirror.failed:
        asked = mirror.compared + mirror.failed
        lost = (mirror.empty + mirror.failed, asked)
        found.append(_share("mirrored requests without an answer", lost, (mirror.live_empty, asked), name, alpha))
        found.append((False, _in_passing(mirror, name)))
    found.sort(key=lambda finding: not finding[0])
    return Finding(any(worse for worse, _ in found), tuple(reason for _, reason in found if reason))


def _share(
    what: str, candidate: tuple[int, int], incumbent: tuple[int, int], incumbent_name: str, alpha: float
) -> tuple[bool, str]:
    """Test whether the candidate's share, given as (bad, all), is higher; return (worse, reason).

    The reason is empty where the candidate has none to compare.
    """
    if not candidate[1]:
        return False, ""
    (bad, total), (bad_before, total_before) = candidate, incumbent
    table = [[bad, total - bad], [bad_before, total_before - bad_before]]
    worse = bool(total_before) and float(fisher_exact(table, alternative="greater").pvalue) < alpha
    word = "more, with confidence" if worse else "not clearly more"
    return worse, f"{what}: {bad} of {total} against {incumbent_name}'s {bad_before} of {total_before}: {word}"


def _slower(
    what: str, candidate: Sequence[float], incumbent: Sequence[float], incumbent_name: str, ratio: float, alpha: float
) -> tuple[bool, str]:
    """Test whether the candidate's latencies (seconds) are above `ratio` times the incumbent's; see `_share`."""
    if not candidate or not incumbent:
        return False, ""
    scaled = [ratio * seconds for seconds in incumbent]
    worse = float(mannwhitneyu(candidate, scaled, alternative="greater").pvalue) < alpha
    word = "slower, with confidence" if worse else "not clearly slower"
    return worse, (
        f"{what} after {1000 * _median(candidate):.0f} ms against {ratio:g} × {incumbent_name}'s "
        f"{1000 * _median(incumbent):.0f} ms: {word}, {len(candidate)} and {len(incumbent)} streams"
    )


def _in_passing(mirror: MirrorTraffic, incumbent_name: str) -> str:
    """Describe how the mirrored answers differ from the incumbent's; a difference alone is not worse."""
    if not mirror.compared:
        return ""
    longer = f", {mirror.words / mirror.live_words:.2f} × as long" if mirror.live_words else ""
    return (
        f"mirror: {mirror.agreement / mirror.compared:.1%} of the leading words as {incumbent_name}'s{longer}, "
        f"refusals {mirror.refusals} against {mirror.live_refusals}, {mirror.compared} requests"
    )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
