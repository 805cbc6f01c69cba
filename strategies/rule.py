"""`Rule`: how updates become the next version, without Flower. Admit → weigh → fold → emit."""

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Protocol

from strategies.adapter import Adapter, Aggregate, Factors, Update
from strategies.admission import Admitted, admit
from strategies.fold import Mean, RoundFold
from strategies.lowrank import LowRank
from strategies.options import Options
from umbel.adapter import Personal
from umbel.errors import ConfigError
from umbel.messages import TrainPlan

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


class Rule(ABC):
    """A rule that turns sites' adapters into the next version; `LoraStrategy` adds Flower's verbs.

    The options of `strategies.options` are keywords; those in `refuses` raise ConfigError, with the reason.
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

    def require(self, update: Factors, received: Adapter) -> None:  # noqa: B027 - most rules ask for nothing more
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
