"""`draw`: the picture of a verdict in docs/how-to/decide-what-is-promoted.md; prints the verdict that it shows.

    .venv-engine/bin/python -m scripts.tools.verdict_picture docs/img/verdict.svg

The losses are invented: 64 held-out questions, a version that lowers most of them, and the third look at them.
"""

import argparse
from pathlib import Path

import numpy as np

from client.heldout_looks import Look
from client.versions.bootstrap import mean_difference
from client.versions.verdict import Probe, judge
from serving.scores import Scores
from umbel.messages import Verdict
from umbel.site.sections import ShadowSection

QUESTIONS, TOKENS = 64, 12
LOOKS = 12
"""Looks whose level is drawn."""


def example() -> tuple[Probe, ShadowSection, Look]:
    """Return the scores of the example, the policy and the look."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(TOKENS // 2, 2 * TOKENS, QUESTIONS)
    live = generator.gamma(4, 0.35, QUESTIONS)
    shadow = live - 0.09 + generator.normal(0, 0.16, QUESTIONS)
    right = live < 1.0
    kept = {
        role: Scores(loss * tokens, tokens.astype(np.int32), right)
        for role, loss in (("live", live), ("shadow", shadow))
    }
    base = Scores(2 * live * tokens, tokens.astype(np.int32), np.zeros(QUESTIONS, np.bool_))
    guard = {"live": kept["live"], "shadow": Scores(kept["live"].loss * 1.002, kept["live"].tokens, right)}
    policy = ShadowSection.model_validate({"guard": [{"name": "triage", "data": "private/triage.jsonl"}]})
    return Probe({"base": base, **kept}, {"triage": guard}), policy, Look(number=5, since=3)


def draw(into: Path) -> Verdict:
    """Draw the example into an SVG file; return its verdict. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "umbel"  # the same figures give the same file
    from matplotlib.figure import Figure

    probe, policy, look = example()
    verdict, alpha = judge(probe, policy, look), (1 - policy.confidence) / 2
    live, shadow = probe.heldout["live"], probe.heldout["shadow"]
    found = mean_difference(shadow.loss - live.loss, live.tokens.astype(np.float64), live.sums.loss, alpha)
    figure = Figure(figsize=(9, 3.4))
    one, other = figure.subplots(1, 2, width_ratios=(3, 2))
    each = np.sort((shadow.loss - live.loss) / live.tokens)
    one.bar(range(QUESTIONS), each, width=0.8, color=["tab:green" if value < 0 else "tab:red" for value in each])
    one.axhline(0, color="black", linewidth=0.8)
    one.axhspan(found.low, found.high, color="tab:blue", alpha=0.25, label="95 % interval of the difference")
    one.axhline(found.value, color="tab:blue", label="difference over all tokens")
    one.set(xlabel="held-out questions, sorted", ylabel="shadow − live, nats per token")
    one.legend(fontsize=7, loc="upper left")
    looks = range(1, LOOKS + 1)
    other.plot(looks, [Look(since=k).level(alpha) for k in looks], "o-", label="asked for at each look")
    other.axhline(found.p_lower, color="tab:green", linestyle="--", label=f"this version: p = {found.p_lower:.1g}")
    other.plot([look.since], [look.level(alpha)], "o", markersize=11, markerfacecolor="none", color="black")
    other.set(yscale="log", xticks=range(1, LOOKS + 1), xlabel="look since a promotion", ylabel="p-value of “lower”")
    other.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(into, metadata={"Date": None})
    return verdict


def main() -> None:
    """Draw the picture and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("into", type=Path)
    verdict = draw(parser.parse_args().into)
    print(verdict.decision, *verdict.reasons, sep="\n")


if __name__ == "__main__":
    main()
