"""LoraStrategy: what every aggregation rule of LoRA adapters shares. Admit → weigh → aggregate."""

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.lowrank import LowRank
from strategies.records import ADAPTER, BODY, metrics, pack_adapter, unpack, unpack_adapter
from umbel import peft_dir
from umbel.errors import AdapterError, BaseMismatch, UmbelError, WireError
from umbel.messages import Failure, JobState, RoundReport, Submit
from umbel.peft_dir import Tensors

log = logging.getLogger("umbel")

MAX_TOKENS_PER_EXAMPLE = 1 << 17
"""No site's context is longer; bounds what an example can weigh."""
MAX_ABS = 100.0
"""No trained LoRA factor comes near it, and an aggregate of such factors still fits into float16."""


@dataclass(frozen=True)
class Adapter:
    """A version in memory, in canonical form (alpha == r, so scale 1)."""

    blob: bytes = field(repr=False)
    """Safetensors bytes."""
    base: str
    """Digest of the base fingerprint it belongs to."""
    digest: str = ""
    tensors: Tensors = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, blob: bytes, base: str) -> "Adapter":
        """Decode an adapter's bytes; raise AdapterError for anything else."""
        return cls(blob, base, peft_dir.digest(blob), peft_dir.decode(blob))

    @property
    def rank(self) -> int:
        return next(int(a.shape[0]) for a, _ in peft_dir.factors(self.tensors).values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path → (out, in)."""
        return {module: (b.shape[0], a.shape[1]) for module, (a, b) in peft_dir.factors(self.tensors).items()}

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return next(iter(self.tensors.values())).dtype


@dataclass(frozen=True)
class Update:
    """What one site sends back from a round."""

    site: str
    blob: bytes = field(repr=False)
    report: RoundReport
    base: str
    """Digest of the site's base fingerprint."""


@dataclass(frozen=True)
class Aggregate:
    """A new version's tensors, and how they came about."""

    tensors: Tensors = field(repr=False)
    """Empty when no update was admitted."""
    weights: dict[str, float]
    """Site → share."""
    left_out: dict[str, str]
    """Site → why its update is not in here."""
    certificate: dict[str, float]
    """Module → relative Frobenius error against the exact mean; empty for rules that have none."""


Factors = dict[str, LowRank]
"""Module path → its update, in float64."""


class LoraStrategy(Strategy):
    """A rule that turns sites' adapters into the next version. One bad update never fails a round.

    A rule is `combine`; the rest is here. `max_examples` bounds what one site may claim to have trained on. Flower's
    own five verbs work on the same records, but `start` does not: training outlives a Flower message, so the rounds
    are run by `server.app` (submit, collect, publish, shadow, judge).
    """

    name: ClassVar[str]

    def __init__(self, *, max_examples: int = 1 << 24) -> None:
        self.max_examples = max_examples
        self._parent: Adapter | None = None

    @abstractmethod
    def combine(
        self, parent: Factors, updates: dict[str, Factors], weights: dict[str, float]
    ) -> tuple[Factors, dict[str, float]]:
        """Module → new factors at the parent's rank, and module → relative error where the rule knows it."""

    def aggregate(self, parent: Adapter, updates: list[Update]) -> Aggregate:
        """Admit, weigh by tokens with a loss, combine; emit in the parent's dtype. Refused sites are named."""
        admitted: dict[str, Factors] = {}
        left_out: dict[str, str] = {}
        for update in sorted(updates, key=lambda update: update.site):  # sums do not depend on who was first
            try:
                admitted[update.site] = self.admit(update, parent)
            except UmbelError as refusal:
                left_out[update.site] = str(refusal)
        reports = {update.site: update.report for update in updates}
        tokens = {site: reports[site].num_loss_tokens for site in admitted}
        if not admitted:
            return Aggregate({}, {}, left_out, {})
        weights = {site: count / sum(tokens.values()) for site, count in tokens.items()}
        combined, certificate = self.combine(factors_of(parent.tensors), admitted, weights)
        return Aggregate(tensors_of(combined, parent.dtype), weights, left_out, certificate)

    def admit(self, update: Update, parent: Adapter) -> Factors:
        """The update's factors; raise AdapterError or BaseMismatch, with the reason, if it may not take part."""
        report = update.report
        if update.base != parent.base:
            raise BaseMismatch(f"trained on base {update.base[:12]}, this federation's is {parent.base[:12]}")
        if report.parent != parent.digest:
            raise AdapterError(f"trained from {report.parent[:12]}, this round's parent is {parent.digest[:12]}")
        if report.state is not JobState.DONE:
            raise AdapterError(f"its round is {report.state}, not done")
        _require_counts(report, self.max_examples)
        if len(update.blob) > 4 * len(parent.blob) + (1 << 20):
            raise AdapterError(f"its adapter has {len(update.blob)} bytes, the parent only {len(parent.blob)}")
        if report.update is not None and peft_dir.digest(update.blob) != report.update:
            raise AdapterError("its adapter is not the one it reported; the bytes changed on the way")
        if report.rank not in (None, parent.rank):
            raise AdapterError(f"its rank is {report.rank}, this round's is {parent.rank}")
        tensors = peft_dir.decode(update.blob)
        peft_dir.validate(tensors, parent.shapes, rank=parent.rank, max_rank=parent.rank)
        factors = factors_of(tensors)
        _require_sane(factors)
        return factors

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One `train.submit` per node. `arrays` holds the parent adapter, `config` the Submit message."""
        content = RecordDict({ADAPTER: arrays, BODY: config})
        submit, blob = unpack(content, Submit), unpack_adapter(content)
        if isinstance(submit, Failure) or blob is None:
            raise WireError("configure_train needs a Submit in `config` and its parent adapter in `arrays`")
        self._parent = Adapter.of(blob, submit.order.base)
        # A list: Flower iterates over it twice.
        return [Message(content, node, "train.submit", group_id=str(server_round)) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`aggregate` over Flower messages that carry a finished round; (None, None) when none is admitted."""
        if self._parent is None:
            raise UmbelError("aggregate_train before configure_train: the parent of this round is not known")
        updates = [update for reply in replies if (update := _update_in(reply, self._parent.base)) is not None]
        result = self.aggregate(self._parent, updates)
        if not result.tensors:
            return None, None
        reports = [update.report for update in updates if update.site in result.weights]
        return pack_adapter(peft_dir.encode(result.tensors)), metrics(*reports)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: a version is evaluated as a shadow, where it will be served."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing: see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log the rule's name and its bound."""
        log.info("strategy %s, at most %d examples per site and round", self.name, self.max_examples)

    def start(self, *args: object, **kwargs: object) -> NoReturn:
        """Not available: training outlives a Flower message."""
        raise NotImplementedError(
            f"{type(self).__name__}.start() cannot run rounds: a site trains longer than one message lives; "
            "use server.app:app as the ServerApp"
        )


def factors_of(tensors: Tensors) -> Factors:
    """An adapter's modules in float64."""
    pairs = peft_dir.factors(tensors).items()
    return {module: LowRank(b.astype(np.float64), a.astype(np.float64)) for module, (a, b) in pairs}


def tensors_of(factors: Factors, dtype: npt.DTypeLike) -> Tensors:
    """Modules → an adapter in canonical form (alpha == r), in `dtype`."""
    tensors: Tensors = {}
    for module, update in factors.items():
        tensors[peft_dir.key(module, "A")] = update.A.astype(dtype)
        tensors[peft_dir.key(module, "B")] = (update.scale * update.B).astype(dtype)
    return tensors


def _require_counts(report: RoundReport, max_examples: int) -> None:
    """A count is a claim: an update weighs what its site says, so the claim is bounded by what the plan allows."""
    if report.num_loss_tokens < 1 or report.num_examples < 1:
        raise AdapterError(
            f"trained on {report.num_examples} examples and {report.num_loss_tokens} tokens; nothing to weigh it by"
        )
    if not math.isfinite(report.loss_sum):
        raise AdapterError(f"its training loss is {report.loss_sum}")
    if report.num_examples > max_examples:
        raise AdapterError(f"claims {report.num_examples} examples, the plan allows {max_examples}")
    if report.num_loss_tokens > report.num_examples * MAX_TOKENS_PER_EXAMPLE:
        raise AdapterError(
            f"claims {report.num_loss_tokens} tokens in {report.num_examples} examples; "
            f"an example has at most {MAX_TOKENS_PER_EXAMPLE}"
        )


def _require_sane(factors: Factors) -> None:
    for module, update in factors.items():
        if max(np.abs(update.A).max(), np.abs(update.B).max()) > MAX_ABS:
            raise AdapterError(f"{module} holds values above {MAX_ABS:g}, far outside what training makes")


def _update_in(reply: Message, base: str) -> Update | None:
    """The update in a Flower reply; None for an error, a failure, or a round that is not done."""
    if not reply.has_content():
        return None
    try:
        report, blob = unpack(reply.content, RoundReport), unpack_adapter(reply.content)
    except WireError as nonsense:
        log.warning("node %d left out: %s", reply.metadata.src_node_id, nonsense)
        return None
    if isinstance(report, Failure) or blob is None:
        return None
    return Update(f"node-{reply.metadata.src_node_id}", blob, report, base)
