"""`LoraStrategy`: base class of every rule that a run configuration can name: a `Rule`, as a Flower strategy."""

import logging
from collections.abc import Iterable
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.adapter import Adapter, Update
from strategies.records import ADAPTER, BODY, metrics, pack_adapter, unpack, unpack_adapter
from strategies.rule import Rule
from umbel import peft_dir
from umbel.errors import UmbelError, WireError
from umbel.messages import Failure, RoundReport, Submit

log = logging.getLogger("umbel")


class LoraStrategy(Rule, Strategy):
    """A rule that turns sites' adapters into the next version. One bad update never fails a round.

    A rule defines `mean`; everything else is in `Rule`, and here what is Flower's. This one is the coordinate-wise
    median of factors (docs/strategies.md):

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

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._parent: Adapter | None = None

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
