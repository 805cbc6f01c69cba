"""`judge`: decide whether a shadow shall answer users, by its scores and the incumbent's on the same examples.

The figure is the mean loss per token, which training lowers and every report names. The tokens of an answer depend on
each other, examples do not. So whole examples are resampled, with both versions' losses on them, and the spread of the
difference is its confidence interval (paired percentile bootstrap: Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13; for test sets of language models Koehn, EMNLP 2004). Against 1 × the incumbent's loss this
is a test of superiority, against a larger multiple a test of non-inferiority.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from serving.scores import Scores
from umbel.messages import Evaluation, Verdict
from umbel.site.sections import ShadowSection

RESAMPLES = 2000
"""Bootstrap samples per interval."""
SEED = 0
"""Fixed, so that the same evidence gives the same verdict, also after a restart."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Scores of base, live (absent while the base answers users) and shadow on the same examples."""

    heldout: Mapping[str, Scores]
    """Role → scores."""
    guards: Mapping[str, Mapping[str, Scores]]
    """Guard → role → scores of the shadow and of the incumbent."""

    @property
    def incumbent(self) -> Literal["live", "base"]:
        """The role that answers users now."""
        return "live" if "live" in self.heldout else "base"

    @property
    def sums(self) -> dict[str, Evaluation]:
        """Sums over the held-out examples; nothing else of the scores leaves the site."""
        return {role: scores.sums for role, scores in self.heldout.items()}


class _Outcome(IntEnum):
    """Result of one set of examples, worst first: the smallest of all sets decides."""

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
    """The shadow's figure minus the incumbent's, with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        word = "lower" if self.high < 0 else "higher" if self.low > 0 else "no clear difference"
        return f"{word}, {self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def judge(probe: Probe, policy: ShadowSection) -> Verdict:
    """Promote a shadow that is better, reject one that is worse on the held-out examples or on any guard, keep others.

    A shadow is kept also where the examples cannot tell: nothing changes, and the reasons say what is missing.
    """
    role = probe.incumbent
    heldout = _compare("held-out", role, probe.heldout, policy.max_loss_ratio, policy)
    guards = [_compare(f"guard {g.name}", role, probe.guards[g.name], g.max_loss_ratio, policy) for g in policy.guard]
    findings = [heldout, *guards]
    worst = min(finding.outcome for finding in findings)
    decision: Literal["promote", "keep", "reject"] = "keep"
    if worst is _Outcome.WORSE:
        decision = "reject"
    elif worst is not _Outcome.CANNOT_TELL and heldout.outcome is _Outcome.BETTER:
        decision = "promote"
    findings.sort(key=lambda finding: min(finding.outcome, _Outcome.NOT_BETTER))  # the deciding reason comes first
    reasons = tuple(reason for finding in findings for reason in finding.reasons)
    return Verdict(accepted=decision == "promote", decision=decision, reasons=reasons)


def _compare(
    name: str, incumbent_name: str, scores: Mapping[str, Scores], ratio: float, policy: ShadowSection
) -> _Finding:
    """Compare the shadow with the incumbent, the role `incumbent_name`, on one set of examples."""
    incumbent, candidate = scores[incumbent_name], scores["shadow"]
    for subject, asked, outcome in (
        ("the shadow", candidate, _Outcome.WORSE),
        (incumbent_name, incumbent, _Outcome.CANNOT_TELL),
    ):
        broken = np.count_nonzero(~np.isfinite(asked.loss))
        if broken:
            said = f"{name}: the loss of {subject} is not a finite number on {broken} of {len(asked)} examples"
            return _Finding(outcome, (said,))
    if len(candidate) < policy.min_examples:
        few = f"{name}: {len(candidate)} examples are too few to tell; [shadow].min_examples is {policy.min_examples}"
        return _Finding(_Outcome.CANNOT_TELL, (few,))
    # A ratio below 1 asks for a gain: a shadow that misses it is not better, but for that alone not worse.
    allowed, wanted = max(ratio, 1.0), ratio
    at_allowed, at_wanted, exact = _differences(incumbent, candidate, allowed, wanted, policy.confidence)
    worse = at_allowed.low > 0
    bar, loss = (allowed, at_allowed) if worse else (wanted, at_wanted)
    against = f"{'' if bar == 1 else f'{bar:g} × '}{incumbent_name}'s {incumbent.sums.loss:.4f}"
    reasons = (
        f"{name} loss {candidate.sums.loss:.4f} against {against}: "
        f"{loss} per token at {100 * policy.confidence:g} % confidence, {len(candidate)} examples",
        f"{name} exact match {candidate.sums.exact_match:.1%} against {incumbent_name}'s "
        f"{incumbent.sums.exact_match:.1%}: {exact}",
    )
    if exact.high < -policy.max_exact_drop:
        return _Finding(_Outcome.WORSE, reasons[::-1])
    return _Finding(_Outcome.WORSE if worse else _Outcome.BETTER if loss.high < 0 else _Outcome.NOT_BETTER, reasons)


def _differences(
    incumbent: Scores, candidate: Scores, allowed: float, wanted: float, confidence: float
) -> tuple[_Difference, _Difference, _Difference]:
    """Return the candidate's loss per token (nats) minus `allowed` and minus `wanted` times the incumbent's, and the
    difference of their shares of exact matches.
    """
    examples, tail = len(candidate), (1 - confidence) / 2
    gained = candidate.exact.astype(np.int8) - incumbent.exact
    columns = np.column_stack((candidate.loss, incumbent.loss, candidate.tokens, gained)).astype(np.float64)
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
