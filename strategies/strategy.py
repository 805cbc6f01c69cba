"""`LoraStrategy`: base class of every rule that aggregates LoRA adapters. Admit → weigh → fold → emit."""

import logging
import tempfile
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NoReturn, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.adapter import Adapter, Aggregate, Factors, Update
from strategies.admission import Admitted, admit
from strategies.fold import Mean, RoundFold
from strategies.lowrank import LowRank
from strategies.options import Options
from strategies.records import ADAPTER, BODY, metrics, pack_adapter, unpack, unpack_adapter
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.errors import ConfigError, UmbelError, WireError
from umbel.messages import Failure, RoundReport, Submit, TrainPlan

log = logging.getLogger("umbel")

MAX_EARLIER_PARENTS = 2
"""Number of earlier rounds whose parent a late update may have been trained from."""


class Fold(Protocol):
    """One round in progress: takes updates as they arrive, in any order, and returns their aggregate at the end."""

    sites: int
    """Number of sites that may answer; it may grow until the first update is added, and not afterwards."""

    def add(self, update: Update, staleness: int = 0) -> None:
        """Admit an update, or leave it out for a reason. `staleness`: rounds since it was asked for."""

    def finish(self) -> Aggregate:
        """Return tensors, weights, reasons and certificate. Call it once."""

    @property
    def admitted(self) -> tuple[str, ...]:
        """The sites whose updates take part so far, in order of arrival."""


class LoraStrategy(Strategy):
    """A rule that turns sites' adapters into the next version. One bad update never fails a round.

    A rule defines `mean`; everything else is here. This one is the coordinate-wise median of factors
    (docs/strategies.md):

        class Median:
            def __init__(self, parent):
                self.parent, self.seen = parent.factors, []

            def add(self, update, received, amount):
                self.seen.append(update)

            def finish(self, total):
                def median(module, factor):
                    return torch.stack([getattr(one[module], factor) for one in self.seen]).median(0).values

                return {module: LowRank(median(module, "B"), median(module, "A")) for module in self.parent}, {}

        class FactorMedian(LoraStrategy):
            name = "median"

            def mean(self, parent):
                return Median(parent)

        result = FactorMedian(norm_clip=2.0).aggregate(parent, updates)

    The options of `strategies.options` are keywords; those in `refuses` raise ConfigError, with the reason. Flower's
    own verbs work on the same records, except `start`: training takes longer than a Flower message lives, so rounds are
    run by `server.app` (submit, collect, publish, shadow, judge).
    """

    name: ClassVar[str]
    """The rule's name in manifests, and in a run configuration (`strategy`)."""
    mixed_ranks: ClassVar[bool] = False
    """True if a site may train at a smaller rank than the others."""
    refuses: ClassVar[dict[str, str]] = {
        "stack_rank": "only flora stacks",
        "personal_rank": "only dual leaves an adapter at the sites",
    }
    """Option → reason why this rule refuses it."""

    def __init__(self, **options: object) -> None:
        self.options = Options.of(options)
        for option, reason in self.refuses.items():
            if getattr(self.options, option) != Options.model_fields[option].default:
                key = option.replace("_", "-")
                raise ConfigError(f"{key} = {getattr(self.options, option)} with strategy = {self.name!r}: {reason}")
        self._parent: Adapter | None = None
        self._earlier: list[Adapter] = []

    @abstractmethod
    def mean(self, parent: Adapter) -> Mean:
        """Begin the running mean of a round."""

    @property
    def personal(self) -> Personal | None:
        """The part of an adapter that stays at each site and is joined to the shared one; none by default."""
        return None

    def measured(self, update: LowRank) -> LowRank:
        """Return the part of a module's update by which changes are measured and compared; all of it by default."""
        return update

    def require(self, update: Factors, received: Adapter) -> None:
        """Raise AdapterError when an update is not what this rule asked for; no further check by default."""

    def plan(self, plan: TrainPlan, round: int, site_max_rank: int) -> TrainPlan:
        """Return one site's plan for one round; `site_max_rank` is the largest rank that its engine serves.

        The round is added to the seed, so that a round which is repeated from the same parent sees the data in another
        order.
        """
        own = self.personal.rank if self.personal else 0
        rank, seed = min(plan.rank, site_max_rank - own), plan.seed + round
        return plan.model_copy(update={"rank": rank, "seed": seed, "personal": self.personal})

    def begin(self, parent: Adapter, spool: Path, sites: int) -> Fold:
        """Begin a round of this many `sites`; `spool` is an empty directory for updates that have to wait."""
        digests = [earlier.digest for earlier in self._earlier]
        if parent.digest in digests:  # the rounds since made no version, or theirs was taken back
            del self._earlier[: digests.index(parent.digest) + 1]
        known = list(self._earlier)

        def allow(update: Update, staleness: int) -> Admitted:
            admitted = admit(
                update, parent, earlier=known if staleness else (),
                max_examples=self.options.max_examples, max_steps=self.options.max_steps, mixed_ranks=self.mixed_ranks,
            )  # fmt: skip
            self.require(admitted.factors, admitted.received)
            return admitted

        fold = RoundFold(parent, spool, sites, self.mean(parent), allow, self.options, self.measured)
        if self.options.buffered:
            self._earlier = [parent, *self._earlier][:MAX_EARLIER_PARENTS]
        return fold

    def aggregate(self, parent: Adapter, updates: list[Update]) -> Aggregate:
        """Aggregate updates that are all there: `begin`, `add` each in the order of the sites' names, `finish`."""
        with tempfile.TemporaryDirectory(prefix="umbel-") as spool:
            fold = self.begin(parent, Path(spool), len(updates))
            for update in sorted(updates, key=lambda update: update.site):
                fold.add(update)
            return fold.finish()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one `train.submit` per node; `arrays` holds the parent adapter, `config` the Submit message.

        Raises WireError when either is missing.
        """
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
        """Run `aggregate` over the messages that carry a finished round; return (None, None) when none is admitted.

        Raises UmbelError before the first `configure_train`.
        """
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
        """Return no message: a version is evaluated as a shadow, where it will be served."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return None: see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log the rule's name and its options."""
        log.info("strategy %s, %s", self.name, self.options)

    def start(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise NotImplementedError: training takes longer than a Flower message lives."""
        raise NotImplementedError(
            f"{type(self).__name__}.start() cannot run rounds: a site trains longer than one message lives; "
            "use server.app:app as the ServerApp"
        )


def _update_in(reply: Message, base: str) -> Update | None:
    """Return the update in a Flower reply; None for an error, a failure, or a round that is not done."""
    if not reply.has_content():
        return None
    try:
        report, blob = unpack(reply.content, RoundReport), unpack_adapter(reply.content)
    except WireError as error:
        log.warning("node %d left out: %s", reply.metadata.src_node_id, error)
        return None
    if isinstance(report, Failure) or blob is None:
        return None
    return Update(f"node-{reply.metadata.src_node_id}", blob, report, base)
