"""`admit`: check that an update may take part in a round. Everything a site claims is checked where it can be."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from strategies.adapter import Adapter, Factors, Update, factors_of
from umbel import peft_dir
from umbel.errors import AdapterError, BaseMismatch
from umbel.messages import JobState, RoundReport

MAX_TOKENS_PER_EXAMPLE = 1 << 17
"""Bounds the weight of one example; no site's context is longer."""
MAX_HELD_EXAMPLES = 1 << 24
"""Bounds the weight of a site; far above any that trains by `umbel serve`."""
MAX_ABS = 100.0
"""Largest absolute value of a factor: far above any trained one, and an aggregate of such factors fits into float16."""


@dataclass(frozen=True)
class Admitted:
    """An update that may take part in the round."""

    factors: Factors
    received: Adapter
    """The adapter that the site started from: the parent, an earlier one, or a truncation of it."""


def admit(
    update: Update, parent: Adapter, *, earlier: Iterable[Adapter] = (), max_examples: int, max_steps: int,
    mixed_ranks: bool,
) -> Admitted:  # fmt: skip
    """Decode an update and return its factors; raise AdapterError or BaseMismatch if it may not take part.

    With `mixed_ranks` a site may have trained at a smaller rank, from the parent's truncation to that rank. A late site
    may have trained from one of the `earlier` parents. `max_examples` and `max_steps` bound what it may say it did.
    """
    report = update.report
    if update.base != parent.base:
        raise BaseMismatch(f"trained on base {update.base[:12]}, this federation's is {parent.base[:12]}")
    if report.state is not JobState.DONE:
        raise AdapterError(f"its round is {report.state}, not done")
    _require_counts(report, max_examples, max_steps)
    _require_data(report)
    if len(update.blob) > 4 * len(parent.blob) + (1 << 20):
        raise AdapterError(f"its adapter has {len(update.blob)} bytes, the parent only {len(parent.blob)}")
    if report.update is not None and peft_dir.digest(update.blob) != report.update:
        raise AdapterError("its adapter is not the one it reported; the bytes changed on the way")
    tensors = peft_dir.decode(update.blob)
    rank = _rank_of(tensors, report, parent, mixed_ranks)
    peft_dir.validate(tensors, parent.shapes, rank=rank, max_rank=parent.rank)
    factors = factors_of(tensors)
    _require_sane(factors)
    return Admitted(factors, _received(report, rank, [parent, *earlier]))


def _require_counts(report: RoundReport, max_examples: int, max_steps: int) -> None:
    """Raise AdapterError for a round that the plan does not allow: its change is divided by its own count of steps."""
    if report.num_loss_tokens < 1 or report.num_examples < 1:
        raise AdapterError(
            f"trained on {report.num_examples} examples and {report.num_loss_tokens} tokens; nothing to weigh it by"
        )
    if not 1 <= report.steps <= max_steps:
        raise AdapterError(f"claims {report.steps} optimizer steps, the plan allows 1 to {max_steps}")
    if not math.isfinite(report.loss_sum):
        raise AdapterError(f"its training loss is {report.loss_sum}")
    if report.num_examples > max_examples:
        raise AdapterError(f"claims {report.num_examples} examples, the plan allows {max_examples}")
    _require_tokens(report.num_loss_tokens, report.num_examples)


def _require_data(report: RoundReport) -> None:
    """Raise AdapterError for an impossible amount of data: a site's own count decides its weight."""
    held, tokens = report.held_examples, report.held_loss_tokens
    if not 1 <= held <= min(tokens, MAX_HELD_EXAMPLES):
        raise AdapterError(
            f"claims to hold {held} examples with {tokens} tokens; each has at least one, and a site holds "
            f"1 to {MAX_HELD_EXAMPLES} examples"
        )
    _require_tokens(tokens, held)


def _require_tokens(tokens: int, examples: int) -> None:
    if tokens > examples * MAX_TOKENS_PER_EXAMPLE:
        raise AdapterError(
            f"claims {tokens} tokens in {examples} examples; an example has at most {MAX_TOKENS_PER_EXAMPLE}"
        )


def _rank_of(tensors: peft_dir.Tensors, report: RoundReport, parent: Adapter, mixed_ranks: bool) -> int:
    """Return the one rank of all modules; raise AdapterError if there are several, or one that was not asked for."""
    ranks = {a.shape[0] if a.ndim else 0 for a, _ in peft_dir.factors(tensors).values()}
    if len(ranks) != 1:
        raise AdapterError(f"its modules have ranks {sorted(ranks)}; an adapter has one rank")
    rank = ranks.pop()
    if report.rank not in (None, rank):
        raise AdapterError(f"its rank is {rank}, it reported {report.rank}")
    if rank > parent.rank or (rank < parent.rank and not mixed_ranks):
        why = "" if mixed_ranks else ", and this strategy's mean of factors needs one rank"
        raise AdapterError(f"its rank is {rank}, this round's is {parent.rank}{why}")
    return rank


def _received(report: RoundReport, rank: int, parents: list[Adapter]) -> Adapter:
    """Return the adapter that a site of `rank` says it started from, by digest; raise AdapterError if there is none."""
    for parent in parents:
        received = parent.at_rank(rank)
        if received.digest == report.parent:
            return received
    raise AdapterError(
        f"trained from {report.parent[:12]}, this round's parent is {parents[0].at_rank(rank).digest[:12]}"
        + (f" at rank {rank}" if rank < parents[0].rank else "")
    )


def _require_sane(factors: Factors) -> None:
    """Raise AdapterError for a factor with values above MAX_ABS."""
    for module, update in factors.items():
        if max(float(update.A.abs().amax()), float(update.B.abs().amax())) > MAX_ABS:
            raise AdapterError(f"{module} holds values above {MAX_ABS:g}, far outside what training makes")
