"""`decide`: which domains of an adapter's data are worth training now, or why none is; `learnt`: what a round taught.

Not every update is worth training (MACE, arXiv 2510.03283). A domain's score is what it may gain per second:

    score = share · (max(rate, above / seconds) + c √(ln(1 + looks) / (1 + trials))) · (1 + drift)

with the rate of its last burst, how far its loss is above what was reached once, a bonus for what was rarely tried
(UCB1: Auer et al., Machine Learning 47, 2002), and its drift. After FLAT_ROUNDS that ended because nothing more came,
the next one needs BACK_OFF times what is left. The clock is an argument, and all state is a `Memory`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.worth.drift import PageHinkley
from client.worth.memory import Body, DomainMemory, Memory

EXPLORE = 0.1
"""c, in medians of the domains' rates."""
FLAT_ROUNDS = 2
"""Rounds in a row without more after which a domain is left out: by one, a slow gain may be lost in the noise."""
BACK_OFF = 1.5
STALE_S = 1800.0
"""Seconds after which a domain is tried again, whatever its score."""
MOST_UNADOPTED = 3
"""Updates in a row from one version and the same data after which no other one is made from them before it is stale."""
TINY = 1e-12
"""Least score that is needed after a round that has brought nothing."""


class Seen(Body):
    """One domain as a round finds it, before it trains."""

    share: float
    """Its part of the rows: the site does not know which part of its users' requests is about it."""
    above: float = 0.0
    """How far its loss is above what was reached, with confidence; nats per token, at least 0."""
    drift: PageHinkley = PageHinkley()
    """With its fresh examples."""


class Decision(Body):
    """What a round trains."""

    train: tuple[str, ...]
    """Domains; none where nothing is worth training."""
    drifted: frozenset[str] = frozenset()
    """Domains whose fresh examples are not like those of before."""
    doubtful: bool = False
    """True where a few steps have to show that it pays: nothing but the time since the last trial speaks for it."""
    reason: str = ""
    """Why nothing is worth training; empty where something is."""


def decide(memory: Memory, seen: Mapping[str, Seen], now: float) -> Decision:
    """Choose what to train at the Unix time `now`."""
    scores = {key: _score(memory, key, one) for key, one in seen.items()}
    drifted = frozenset(key for key, one in seen.items() if one.drift.drift >= 1)
    new = {key for key in seen if not memory.domain(key).trials}
    stale = {key for key in seen if now - memory.domain(key).tried >= STALE_S}
    due = drifted | new | stale
    train = tuple(key for key in seen if key in due or scores[key] >= memory.domain(key).needed)
    if memory.unadopted >= MOST_UNADOPTED and not due:
        reason = f"{memory.unadopted} updates from this version and these examples were made, and none was adopted"
        return Decision(train=(), reason=reason)
    if not train:
        return Decision(train=(), reason=_reason(memory, seen, scores))
    doubtful = all(memory.domain(key).needed and not seen[key].above and key not in drifted | new for key in train)
    return Decision(train=train, drifted=drifted & set(train), doubtful=doubtful)


def unchanged(memory: Memory, parent: str, data: str, now: float) -> str:
    """Return why a round is not worth training without a look at it; empty where it has to be looked at.

    It is so where neither the version nor the data are others than in a round that was not worth it.
    """
    stale = any(now - one.tried >= STALE_S for one in memory.domains.values())
    return "" if stale or (memory.parent, memory.data) != (parent, data) else memory.reason


@dataclass(frozen=True)
class Taught:
    """What a round has shown of one domain that it trained."""

    rate: float
    """Gain of its last burst, in nats per token and second of the device."""
    seconds: float
    """Time of the device that the round took."""
    more: bool
    """True where it still gained when its steps or seconds came to an end."""
    reached: Mapping[int, float]


def learnt(memory: Memory, seen: Mapping[str, Seen], taught: Mapping[str, Taught], now: float) -> Memory:
    """Return the memory after a look, and a round that has `taught` something of the domains that it trained."""
    tried: dict[str, DomainMemory] = {}
    for key in seen:
        before = memory.domain(key)
        if key not in taught:
            tried[key] = before.model_copy(update={"drift": seen[key].drift})
            continue
        one, losses = taught[key], list(taught[key].reached.values())
        tried[key] = DomainMemory(
            trials=before.trials + 1, rate=max(0.0, one.rate), seconds=one.seconds, needed=before.needed,
            flat=0 if one.more else before.flat + 1,
            reached=dict(one.reached), mean=statistics.fmean(losses), spread=statistics.pstdev(losses),
            drift=before.drift if one.more else PageHinkley(), tried=now,
        )  # fmt: skip
    after = memory.with_domains(tried, looks=memory.looks + 1)
    needed = {}
    for key in taught:
        quiet = _score(after, key, Seen(share=seen[key].share))
        rests = after.domain(key).flat >= FLAT_ROUNDS
        needed[key] = max(TINY, BACK_OFF * quiet, after.domain(key).needed) if rests else 0.0
    return after.with_domains(
        {key: after.domain(key).model_copy(update={"needed": least}) for key, least in needed.items()}
    )


def _score(memory: Memory, key: str, seen: Seen) -> float:
    """Return what a domain may gain per second of the device, in nats per token."""
    one = memory.domain(key)
    rates = [known.rate for known in memory.domains.values() if known.rate > 0]
    bonus = EXPLORE * statistics.median(rates) if rates else 0.0
    bonus *= math.sqrt(math.log1p(memory.looks) / (1 + one.trials))
    prior = seen.above / one.seconds if one.seconds > 0 else 0.0
    return seen.share * (max(one.rate, prior) + bonus) * (1 + seen.drift.drift)


def _reason(memory: Memory, seen: Mapping[str, Seen], scores: Mapping[str, float]) -> str:
    best: Sequence[str] = sorted(scores, key=lambda key: scores[key] - memory.domain(key).needed)
    key = best[-1]
    drift = max(one.drift.drift for one in seen.values())
    which = f"the best of {len(seen)} domains" if len(seen) > 1 else "more training"
    return (
        f"the last rounds have brought nothing more, since then the loss has not risen above what was reached, and the "
        f"drift of fresh examples is {drift:.2f}, where 1 is an alarm; {which} scores {scores[key]:.2g}, and "
        f"{memory.domain(key).needed:.2g} is needed"
    )
