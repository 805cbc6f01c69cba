"""`compare`: test whether a candidate serves users worse than the incumbent, by errors, latency, ratings and mirror.

Each of these is a one-sided test of its own. Both versions answer at the same time, each its own users, so they meet
the same load; and the tests are over users, not requests (see `client.versions.randomisation`), as one user's requests
resemble each other. Below `min_users` on either side latencies and ratings decide nothing. Errors then are compared
request by request (Fisher's exact test), both with those of the others meanwhile and with the same users' own before:
only what both show is worse, so a user whose requests fail with every version is no evidence (an intersection-union
test: Berger, Technometrics 1982). The mirror's counts are of the same requests, and take Fisher's test as they are.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scipy.stats import fisher_exact

from client.versions.randomisation import Share, Wait, more_often, slower
from serving.traffic_report import MirrorTraffic, UserTraffic, VersionTraffic
from umbel.site.sections import ShadowSection

NOTHING = VersionTraffic()
Clock = Literal["ttft", "tpot"]


@dataclass(frozen=True)
class Finding:
    """A version's traffic compared with the incumbent's."""

    worse: bool
    reasons: tuple[str, ...]
    """In words, the deciding one first."""
    few_users: bool = False
    """True if there were too few users for latencies and ratings to be told."""


def compare(
    candidate: VersionTraffic, incumbent: VersionTraffic, incumbent_name: str, policy: ShadowSection, alpha: float,
    mirror: MirrorTraffic | None = None, before: VersionTraffic = NOTHING,
) -> Finding:  # fmt: skip
    """Test whether the candidate serves users worse than the incumbent, in the same time.

    `alpha` is the probability of a false alarm; `incumbent_name` stands for the incumbent in the reasons; `before` is
    what it had answered before. `mirror` is None where there is none, and so users are all that there is to compare.
    """
    name, others = incumbent_name, _others(candidate, incumbent)
    few = fewest_users(candidate, incumbent) < policy.min_users
    found = [_errors(candidate, incumbent, name, before, few, alpha)]
    if few:
        if mirror is None or policy.canary_share:
            ours = len(candidate.by_user)
            found.append((False, f"cannot tell latencies and ratings: {ours} users of it and {len(others)} of {name}'s "
                                 f"meanwhile, min_users = {policy.min_users}"))  # fmt: skip
    else:
        found.append(_ratings(candidate, incumbent, name, alpha))
        for clock in ("ttft", "tpot"):
            found.append(_slower(clock, candidate, incumbent, name, before, policy.max_latency_ratio, alpha))
    if mirror is not None and mirror.compared + mirror.failed:
        asked = mirror.compared + mirror.failed
        lost, live_lost = (mirror.empty + mirror.failed, asked), (mirror.live_empty, asked)
        worse = _fisher(lost, live_lost) < alpha
        found.append((worse, _shares("mirrored requests without an answer", lost, live_lost, name, worse)))
        found.append((False, _in_passing(mirror, name)))
    found.sort(key=lambda finding: not finding[0])
    return Finding(any(worse for worse, _ in found), tuple(reason for _, reason in found if reason), few)


def fewest_users(candidate: VersionTraffic, incumbent: VersionTraffic) -> int:
    """Return the number of users on the side that has fewer."""
    return min(len(candidate.by_user), len(_others(candidate, incumbent)))


def _others(candidate: VersionTraffic, incumbent: VersionTraffic) -> list[UserTraffic]:
    """Return the incumbent's users but those whom the candidate answers, too, who only rated an earlier answer."""
    return [user for code, user in incumbent.by_user.items() if code not in candidate.by_user]


def _errors(
    candidate: VersionTraffic, incumbent: VersionTraffic, name: str, before: VersionTraffic, few: bool, alpha: float
) -> tuple[bool, str]:
    """Return (worse, reason); the reason is empty where there is nothing to compare, as everywhere below."""
    ours, others = list(candidate.by_user.values()), _others(candidate, incumbent)
    bad, bad_meanwhile = _failed(ours), _failed(others)
    bad_before = _failed(before.by_user[code] for code in candidate.by_user if code in before.by_user)
    if not bad[1]:
        return False, ""
    if few and bad_before[1]:
        worse = max(_fisher(bad, bad_meanwhile), _fisher(bad, bad_before)) < alpha
        name = f"the same users' {bad_before[0]} of {bad_before[1]} before and {name}"
    else:
        worse = more_often(
            [(user.errors, user.requests) for user in ours], [(user.errors, user.requests) for user in others], alpha
        )
    return worse, _shares("errors", bad, bad_meanwhile, name, worse)


def _ratings(candidate: VersionTraffic, incumbent: VersionTraffic, name: str, alpha: float) -> tuple[bool, str]:
    ours, others = ([(user.down, user.down + user.up) for user in side]
                    for side in (candidate.by_user.values(), _others(candidate, incumbent)))  # fmt: skip
    bad, bad_meanwhile = ((sum(down for down, _ in side), sum(rated for _, rated in side)) for side in (ours, others))
    if not bad[1]:
        return False, ""
    worse = more_often(ours, others, alpha)
    return worse, _shares("bad ratings", bad, bad_meanwhile, name, worse)


def _slower(
    clock: Clock, candidate: VersionTraffic, incumbent: VersionTraffic, name: str, before: VersionTraffic, ratio: float,
    alpha: float,
) -> tuple[bool, str]:  # fmt: skip
    what, earlier = ("first token" if clock == "ttft" else "next token"), before.by_user
    ours: list[Wait] = []
    others: list[Wait] = []
    for code, user in (incumbent.by_user | candidate.by_user).items():
        total, streams = _timed(user, clock)
        if streams:
            past, number = _timed(earlier.get(code, UserTraffic()), clock)
            side = ours if code in candidate.by_user else others
            side.append((total / streams, streams, past / number if number else None))
    if not ours or not others:
        return False, ""
    worse = slower(ours, others, ratio, alpha)
    took, took_meanwhile = (
        1000 * math.exp(sum(mean * streams for mean, streams, _ in side) / sum(streams for _, streams, _ in side))
        for side in (ours, others)
    )
    word = "slower, with confidence" if worse else "not clearly slower"
    return worse, (
        f"{what} after {took:.0f} ms against {ratio:g} × {name}'s {took_meanwhile:.0f} ms: {word}, {len(ours)} and "
        f"{len(others)} users"
    )


def _timed(user: UserTraffic, clock: Clock) -> tuple[float, int]:
    return (user.log_ttft, user.streams) if clock == "ttft" else (user.log_tpot, user.paced)


def _failed(users: Iterable[UserTraffic]) -> Share:
    counted = [(user.errors, user.requests) for user in users]
    return sum(errors for errors, _ in counted), sum(requests for _, requests in counted)


def _fisher(ours: Share, others: Share) -> float:
    """Return the probability that chance alone makes our share so much higher; 1 where there are no others."""
    if not others[1]:
        return 1.0
    table = [[bad, total - bad] for bad, total in (ours, others)]
    return float(fisher_exact(table, alternative="greater").pvalue)


def _shares(what: str, ours: Share, others: Share, name: str, worse: bool) -> str:
    word = "more, with confidence" if worse else "not clearly more"
    return f"{what}: {ours[0]} of {ours[1]} against {name}'s {others[0]} of {others[1]}: {word}"


def _in_passing(mirror: MirrorTraffic, incumbent_name: str) -> str:
    """Describe how the mirrored answers differ from the incumbent's; a difference alone is not worse."""
    if not mirror.compared:
        return ""
    longer = f", {mirror.words / mirror.live_words:.2f} × as long" if mirror.live_words else ""
    return (
        f"mirror: {mirror.agreement / mirror.compared:.1%} of the leading words as {incumbent_name}'s{longer}, "
        f"refusals {mirror.refusals} against {mirror.live_refusals}, {mirror.compared} requests"
    )
