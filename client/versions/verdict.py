"""`judge`: decide whether a shadow shall answer users, by its scores and the incumbent's on the same examples.

The figure is the mean loss per token, which training lowers and every report names. The tokens of an answer depend on
each other, and so may examples that ask the same; groups of examples do not (`client.versions.bootstrap`). Against 1 ×
the incumbent's loss this is a test of superiority, against a larger multiple a test of non-inferiority.

Each of the two errors has the probability α = (1 − confidence) / 2, however many sets and rounds there are:

- to reject is to find the shadow worse on any set, in loss or in exact matches, so all of these tests share α (Holm,
  Scandinavian Journal of Statistics 6, 1979);
- to promote it must be better on the held-out examples and worse on no set, which needs no correction (Berger,
  Technometrics 24, 1982); but verdicts by the same held-out examples share α (`client.heldout_looks`).

Of pairs of answers the figure is the preference accuracy: the share in which the chosen answer is more likely than the
rejected one. Better and worse are tests of it alone, by pairs that one version has right and the other one wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import NormalDist
from typing import Literal

import numpy as np

from client.heldout_looks import Look
from client.versions.bootstrap import MOST_COUNTED, Difference, mean_difference, share_difference
from serving.scores import Scores, effective_size
from umbel.messages import Evaluation, Verdict
from umbel.site.sections import ShadowSection

MUCH_WIDER = 1.2
"""From so many times as wide an interval on, for skewed differences, a reason says so."""


@dataclass(frozen=True)
class Probe:
    """Scores of base, live (absent while the base answers users) and shadow on the same examples."""

    heldout: Mapping[str, Scores]
    """Role → scores."""
    guards: Mapping[str, Mapping[str, Scores]]
    """Guard → role → scores of the shadow and of the incumbent."""
    asked: str = ""
    """Digest of what the held-out examples ask. Verdicts are counted by it."""

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
class _Comparison:
    """The shadow and the incumbent on one set of examples."""

    name: str
    incumbent_name: str
    incumbent: Scores
    candidate: Scores
    allowed: float
    """The shadow is worse above this many times the incumbent's loss."""
    wanted: float
    """It is better below this many times it."""
    at_allowed: Difference
    at_wanted: Difference
    exact: Difference

    @property
    def p_worse(self) -> tuple[float, ...]:
        """p-values of a shadow that is worse: in loss, in exact matches."""
        return self.at_allowed.p_higher, self.exact.p_lower


@dataclass(frozen=True)
class _Preferences:
    """The shadow and the incumbent on one set of pairs of answers."""

    name: str
    incumbent_name: str
    incumbent: Scores
    candidate: Scores
    accuracy: Difference
    """Difference of the shares that are right; `p_lower` is of a drop by more than is allowed."""
    wrong: Difference
    """Difference of the shares that are wrong; `p_lower` is of a shadow that is better."""

    @property
    def p_worse(self) -> tuple[float, ...]:
        """p-value of a shadow that is worse."""
        return (self.accuracy.p_lower,)


def judge(probe: Probe, policy: ShadowSection, look: Look | None = None) -> Verdict:
    """Promote a shadow that is better, reject one that is worse on the held-out examples or on any guard, keep others.

    A shadow is kept also where the examples cannot tell: nothing changes, and the reasons say what is missing. `look`
    says how often these held-out examples were looked at; by default this is the first time.
    """
    role, look, alpha = probe.incumbent, look or Look(), (1 - policy.confidence) / 2
    compared = [_compare("held-out", role, probe.heldout, policy.max_loss_ratio, policy)]
    compared += [
        _compare(f"guard {g.name}", role, probe.guards[g.name], g.max_loss_ratio, policy) for g in policy.guard
    ]
    worse = iter(_holm([p for one in compared if not isinstance(one, _Finding) for p in one.p_worse], alpha))
    findings = []
    for number, one in enumerate(compared):
        looked = look if number == 0 else None
        if isinstance(one, _Comparison):
            one = _finding(one, policy, (next(worse), next(worse)), looked)
        elif isinstance(one, _Preferences):
            one = _preferred(one, policy, next(worse), looked)
        findings.append(one)
    heldout = findings[0]
    worst = min(finding.outcome for finding in findings)
    decision: Literal["promote", "keep", "reject"] = "keep"
    if worst is _Outcome.WORSE:
        decision = "reject"
    elif worst is not _Outcome.CANNOT_TELL and heldout.outcome is _Outcome.BETTER:
        decision = "promote"
    findings.sort(key=lambda finding: min(finding.outcome, _Outcome.NOT_BETTER))  # the deciding reason comes first
    reasons = [reason for finding in findings for reason in finding.reasons]
    if look.number * alpha >= 1:
        reasons.append(
            f"held-out: {look.number} verdicts were by these examples, about as many as one error in {1 / alpha:.0f} "
            "allows; give other held-out examples"
        )
    return Verdict(accepted=decision == "promote", decision=decision, reasons=tuple(reasons))


def _holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which of the hypotheses are rejected so that the probability of any error is at most `alpha`."""
    rejected = [False] * len(p_values)
    for left, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - left):
            break
        rejected[index] = True
    return rejected


def _compare(
    name: str, incumbent_name: str, scores: Mapping[str, Scores], ratio: float, policy: ShadowSection
) -> _Comparison | _Preferences | _Finding:
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
    counts_as = effective_size(candidate.by_cluster(candidate.tokens)[0])
    if counts_as < policy.min_examples:
        which = "examples" if len(candidate) < policy.min_examples else f"examples that count as {int(counts_as)}"
        few = f"{name}: {len(candidate)} {which} are too few to tell; [shadow].min_examples is {policy.min_examples}"
        return _Finding(_Outcome.CANNOT_TELL, (few,))
    # A ratio below 1 asks for a gain: a shadow that misses it is not better, but for that alone not worse.
    allowed, alpha = max(ratio, 1.0), (1 - policy.confidence) / 2
    gained = candidate.exact.astype(np.int8) - incumbent.exact
    ones = np.ones(len(candidate))
    new, old, tokens, gains, examples = candidate.by_cluster(
        candidate.loss, incumbent.loss, candidate.tokens, gained, ones
    )
    exact = share_difference(gains, examples, policy.max_exact_drop, alpha)
    if candidate.pairs:
        wrong = share_difference(-gains, examples, 0.0, alpha)
        return _Preferences(name, incumbent_name, incumbent, candidate, exact, wrong)
    at = {bar: mean_difference(new - bar * old, tokens, incumbent.sums.loss, alpha) for bar in {allowed, ratio}}
    return _Comparison(
        name, incumbent_name, incumbent, candidate, allowed, ratio, at[allowed], at[ratio], exact
    )  # fmt: skip


def _finding(found: _Comparison, policy: ShadowSection, worse: tuple[bool, bool], look: Look | None) -> _Finding:
    """Say what a comparison comes to; `worse`: in loss, in exact matches; `look` is of the held-out examples."""
    alpha = (1 - policy.confidence) / 2
    level = look.level(alpha) if look else alpha
    better = found.at_wanted.p_lower <= level
    bar, loss = (found.allowed, found.at_allowed) if worse[0] else (found.wanted, found.at_wanted)
    incumbent, candidate, role = found.incumbent.sums, found.candidate.sums, found.incumbent_name
    against = f"{'' if bar == 1 else f'{bar:g} × '}{role}'s {incumbent.loss:.4f}"
    told = (
        f"{found.name} loss {candidate.loss:.4f} against {against}: {_word(loss, worse[0], better)}, "
        f"{loss} per token at {100 * policy.confidence:g} % confidence, {len(found.candidate)} examples"
    )
    told += _looked(look, found.at_wanted.p_lower, alpha)
    if look is not None and not better and found.at_wanted.value < 0 and found.at_wanted.widened > MUCH_WIDER:
        told += _skewed(found.at_wanted, level, alpha)
    reasons = (
        told,
        f"{found.name} exact match {candidate.exact_match:.1%} against {role}'s {incumbent.exact_match:.1%}: "
        f"{_word(found.exact, higher=False, lower=worse[1])}, {found.exact}",
    )
    if worse[1]:
        return _Finding(_Outcome.WORSE, reasons[::-1])
    return _Finding(_Outcome.WORSE if worse[0] else _Outcome.BETTER if better else _Outcome.NOT_BETTER, reasons)


def _preferred(found: _Preferences, policy: ShadowSection, worse: bool, look: Look | None) -> _Finding:
    """Say what a comparison by pairs comes to; `look` is of the held-out examples."""
    alpha = (1 - policy.confidence) / 2
    better = found.wrong.p_lower <= (look.level(alpha) if look else alpha)
    incumbent, candidate, role = found.incumbent.sums, found.candidate.sums, found.incumbent_name
    told = (
        f"{found.name} preference accuracy {candidate.exact_match:.1%} against {role}'s {incumbent.exact_match:.1%}: "
        f"{_word(found.accuracy, higher=better, lower=worse)}, {found.accuracy} at {100 * policy.confidence:g} % "
        f"confidence, {len(found.candidate)} pairs"
    )
    outcome = _Outcome.WORSE if worse else _Outcome.BETTER if better else _Outcome.NOT_BETTER
    return _Finding(outcome, (told + _looked(look, found.wrong.p_lower, alpha),))


def _looked(look: Look | None, p_better: float, alpha: float) -> str:
    """Say which look this was, and if it alone keeps a shadow from being better."""
    if look is None or look.number == 1:
        return ""
    told, level = f"; look {look.number} at them", look.level(alpha)
    if level < p_better <= alpha:
        since = f", {look.since} since a promotion" if look.since < look.number else ""
        told += (
            f"{since}: p = {p_better:.2g}, and {level:.2g} is asked for by now; give other held-out examples, or train "
            "for longer"
        )
    return told


def _skewed(found: Difference, level: float, alpha: float) -> str:
    """Say that a few examples are much worse than the others, and how many would be enough to know all the same."""
    normal = NormalDist()
    enough = found.enough(normal.inv_cdf(level) / normal.inv_cdf(alpha))
    wanted = "more" if enough >= MOST_COUNTED else f"about {enough}"
    return (
        f"; a few got much worse, and {found.clusters} examples tell badly how often that happens, so the interval is "
        f"{found.widened:.1f} × as wide; {wanted} would be enough for this difference"
    )


def _word(difference: Difference, higher: bool, lower: bool) -> str:
    """Say which way a difference goes, for certain where one of both is known."""
    if higher or lower:
        return "higher" if higher else "lower"
    low, high = difference.low, difference.high
    return "perhaps lower" if high < 0 else "perhaps higher" if low > 0 else "no clear difference"
