"""Whether a shadow shall answer users: a decision and its evidence, from the same examples as what answers them now.

The figure is the mean loss per token, which training lowers and every report names. The tokens of an answer depend on
each other, examples do not: so whole examples are drawn anew, with both versions' losses on them, and the spread of the
difference is its confidence interval (paired percentile bootstrap: Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13; for test sets of language models Koehn, EMNLP 2004). Against 1 × the loss of what answers
users now this is a test of superiority, against more a test of non-inferiority.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from serving.scores import Scores
from umbel.messages import Evaluation, Verdict
from umbel.site_sections import ShadowSection

RESAMPLES = 2000
SEED = 0
"""The same evidence gives the same verdict, also after a restart."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Base, live (absent while the base answers users) and shadow on the same examples, as role → scores."""

    heldout: Mapping[str, Scores]
    guards: Mapping[str, Mapping[str, Scores]]
    """Guard → role → scores, of the shadow and of what answers users now."""

    @property
    def incumbent(self) -> Literal["live", "base"]:
        """What answers users now."""
        return "live" if "live" in self.heldout else "base"

    @property
    def sums(self) -> dict[str, Evaluation]:
        """What may leave the site."""
        return {role: scores.sums for role, scores in self.heldout.items()}


class _Outcome(IntEnum):
    """What a set of examples says of the shadow; the smallest decides."""

    WORSE = 0
    CANNOT_TELL = 1
    NOT_BETTER = 2
    BETTER = 3


@dataclass(frozen=True)
class _Finding:
    outcome: _Outcome
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Difference:
    """The shadow's figure less the incumbent's."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        word = "lower" if self.high < 0 else "higher" if self.low > 0 else "no clear difference"
        return f"{word}, {self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def judge(probe: Probe, policy: ShadowSection) -> Verdict:
    """Promote a shadow that is better, reject one that is worse on the held-out examples or on any guard, keep others.

    Where the examples cannot tell, it is kept too: nothing changes, and the reasons say what is missing.
    """
    who = probe.incumbent
    heldout = _compare("held-out", who, probe.heldout, policy.max_loss_ratio, policy)
    guards = [_compare(f"guard {g.name}", who, probe.guards[g.name], g.max_loss_ratio, policy) for g in policy.guard]
    findings = [heldout, *guards]
    worst = min(finding.outcome for finding in findings)
    decision: Literal["promote", "keep", "reject"] = "keep"
    if worst is _Outcome.WORSE:
        decision = "reject"
    elif worst is not _Outcome.CANNOT_TELL and heldout.outcome is _Outcome.BETTER:
        decision = "promote"
    findings.sort(key=lambda finding: min(finding.outcome, _Outcome.NOT_BETTER))  # what decided comes first
    reasons = tuple(reason for finding in findings for reason in finding.reasons)
    return Verdict(accepted=decision == "promote", decision=decision, reasons=reasons)


def _compare(name: str, who: str, scores: Mapping[str, Scores], ratio: float, policy: ShadowSection) -> _Finding:
    """The shadow against `who` answers users now, on one set of examples."""
    now, new = scores[who], scores["shadow"]
    for subject, asked, outcome in (("the shadow", new, _Outcome.WORSE), (who, now, _Outcome.CANNOT_TELL)):
        broken = np.count_nonzero(~np.isfinite(asked.loss))
        if broken:
            said = f"{name}: the loss of {subject} is not a finite number on {broken} of {len(asked)} examples"
            return _Finding(outcome, (said,))
    if len(new) < policy.min_examples:
        few = f"{name}: {len(new)} examples are too few to tell; [shadow].min_examples is {policy.min_examples}"
        return _Finding(_Outcome.CANNOT_TELL, (few,))
    # A ratio below 1 asks for a gain: a shadow that misses it is not better, but for that alone not worse.
    allowed, wanted = max(ratio, 1.0), ratio
    at_allowed, at_wanted, exact = _differences(now, new, allowed, wanted, policy.confidence)
    worse = at_allowed.low > 0
    bar, loss = (allowed, at_allowed) if worse else (wanted, at_wanted)
    reasons = (
        f"{name} loss {new.sums.loss:.4f} against {'' if bar == 1 else f'{bar:g} × '}{who}'s {now.sums.loss:.4f}: "
        f"{loss} per token at {100 * policy.confidence:g} % confidence, {len(new)} examples",
        f"{name} exact match {new.sums.exact_match:.1%} against {who}'s {now.sums.exact_match:.1%}: {exact}",
    )
    if exact.high < -policy.max_exact_drop:
        return _Finding(_Outcome.WORSE, reasons[::-1])
    return _Finding(_Outcome.WORSE if worse else _Outcome.BETTER if loss.high < 0 else _Outcome.NOT_BETTER, reasons)


def _differences(
    now: Scores, new: Scores, allowed: float, wanted: float, confidence: float
) -> tuple[_Difference, _Difference, _Difference]:
    """Of the loss per token from `allowed` and from `wanted` times that of `now`, and of the share of exact matches."""
    examples, tail = len(new), (1 - confidence) / 2
    gained = new.exact.astype(np.int8) - now.exact
    columns = np.column_stack((new.loss, now.loss, new.tokens, gained)).astype(np.float64)
    generator = np.random.default_rng(SEED)
    draws = (generator.integers(examples, size=examples) for _ in range(RESAMPLES))
    drawn = np.stack([columns[draw].sum(axis=0) for draw in draws])

    def interval(statistic: Callable[[Floats], Floats]) -> _Difference:
        low, high = np.quantile(statistic(drawn), (tail, 1 - tail))
        return _Difference(float(statistic(columns.sum(axis=0))), float(low), float(high))

    return (
        interval(lambda sums: (sums[..., 0] - allowed * sums[..., 1]) / sums[..., 2]),
        interval(lambda sums: (sums[..., 0] - wanted * sums[..., 1]) / sums[..., 2]),
        interval(lambda sums: sums[..., 3] / examples),
    )
