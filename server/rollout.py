"""`Rollout`: shadow a version at every site, count the verdicts, promote or discard it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from server import dialogues
from server.dialogues import Sites
from server.keyring import Keyring
from server.waves import Waves, went_back
from strategies.adapter import Adapter
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.messages import Hello, ShadowReport


@dataclass(frozen=True)
class Judgement:
    """The sites' verdicts on a shadow."""

    accepted: bool
    """True when at least a quorum of sites accepted it."""
    reports: dict[str, ShadowReport]
    reasons: dict[str, str]
    """Site → its verdict in words, or the reason why it gave none; "*" for all together."""

    @property
    def in_favour(self) -> set[str]:
        """The sites that accepted it."""
        return {site for site, report in self.reports.items() if accepts(report)}

    @property
    def answering(self) -> set[str]:
        """The sites where it was live before an interruption."""
        lived = (Lifecycle.LIVE, Lifecycle.RETIRED)
        return {site for site, report in self.reports.items() if report.state in lived}


@dataclass
class Promotion:
    """The progress of a promotion."""

    sites: dict[str, ShadowReport] = field(default_factory=dict)
    """Sites where the version is live, or was."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Site in favour → reason why the version was not promoted there."""
    went_back: dict[str, str] = field(default_factory=dict)
    """Site that rolled itself back → its words."""
    stopped: str = ""
    """Reason why the promotion is stopped and rolled back everywhere; empty for one that is complete."""


class Rollout:
    """Rolls versions out over an Exchange. `quorum` sites have to accept; each step may take `grace_s` seconds.

    Once a quorum has accepted, the other sites' verdicts are waited for only until `straggler_s` seconds have passed.
    `sign` signs the manifest that a site gets, which differs from the published one (see `for_site`). Verdicts have
    to be signed with `keys`.
    """

    def __init__(
        self,
        exchange: Sites,
        *,
        quorum: int,
        straggler_s: float,
        grace_s: float,
        sign: Callable[[AdapterManifest], str],
        keys: Keyring,
        waves: Waves = Waves(),  # noqa: B008 - frozen
    ) -> None:
        self._exchange = exchange
        self._waves = waves
        self._sign = sign
        self._keys = keys
        self._quorum = quorum
        self._straggler_s = straggler_s
        self._grace_s = grace_s

    def shadow(self, manifest: AdapterManifest, blob: bytes, kin: str = "") -> Judgement:
        """Load a version beside the live one at every site, at the rank it can hold, and ask each for its verdict.

        `kin` is what the bases have in common that may serve it, in a run with `mixed-bases`.
        """
        version = Adapter.of(blob, manifest.base)
        in_time = self._exchange.clock() + self._straggler_s

        def enough(reports: Mapping[str, ShadowReport]) -> bool:
            return self._exchange.clock() >= in_time and sum(map(accepts, reports.values())) >= self._quorum

        def begin(site: str, hello: Hello) -> dialogues.Dialogue[ShadowReport, ShadowReport]:
            received, weights = for_site(hello, manifest, version, kin)
            return dialogues.shadow(site, self._keys, received, weights, self._sign(received))

        outcome = self._exchange.converse(
            begin,
            self._deadline(),
            group=f"shadow {manifest.ref}",
            enough=enough,
        )
        votes = sum(accepts(report) for report in outcome.answers.values())
        reasons = {site: _in_words(report) for site, report in outcome.answers.items()} | outcome.left_out
        reasons["*"] = f"accepted by {votes} of {len(reasons)} sites, {self._quorum} needed"
        return Judgement(votes >= self._quorum, outcome.answers, reasons)

    def promote(
        self,
        ref: AdapterRef,
        judgement: Judgement,
        *,
        overruled: Callable[[], str] = lambda: "",
        tell: Callable[..., None] = lambda event, **fields: None,
    ) -> Promotion:
        """Make a version live at the sites that accepted it, wave by wave; the other sites keep their live version.

        The promotion stops when too many sites roll themselves back, or when `overruled` returns a reason. After a
        restart the waves are the same, and a wave is not watched again if the next one had begun.
        """
        waves = self._waves.of(judgement.in_favour, ref)
        promotion = Promotion()
        if self._waves.watched:
            tell("fleet.waves", waves=waves)
        for number, wave in enumerate(waves, start=1):
            promotion.stopped = overruled()
            if promotion.stopped:
                return promotion
            outcome = self._exchange.converse(
                lambda *_: dialogues.promote(str(ref)), self._deadline(), group=f"promote {ref}", sites=set(wave)
            )
            promotion.sites |= outcome.answers
            promotion.left_out |= outcome.left_out
            if not self._waves.watched:
                continue
            begun = judgement.answering & {site for later in waves[number:] for site in later}
            until = self._exchange.clock() + (0.0 if begun else self._waves.pause_s)
            if self._exchange.gather(lambda _: bool(overruled()), until):
                promotion.stopped = overruled()
            else:
                self._watch(ref, promotion, {site for one in waves[:number] for site in one})
            tell("fleet.wave", wave=number, sites=sorted(promotion.sites), went_back=promotion.went_back)
            if promotion.stopped:
                return promotion
        self.discard(ref, judgement.reports.keys() - judgement.in_favour)
        return promotion

    def _watch(self, ref: AdapterRef, promotion: Promotion, sites: set[str]) -> None:
        """Ask the sites of the waves so far which version is live, and stop when too many have rolled back."""
        asked = self._exchange.converse(
            lambda site, _: dialogues.hello(site, ref.name, self._keys), self._deadline(), group=f"watch {ref}",
            sites=sites & self._exchange.roster.sites.keys(),
        )  # fmt: skip
        left = {site: went_back(hello, ref, promoted=site in promotion.sites) for site, hello in asked.answers.items()}
        promotion.went_back = {site: how for site, how in sorted(left.items()) if how}
        failed, of = len(promotion.went_back), len(promotion.sites.keys() | promotion.went_back.keys())
        if self._waves.too_many(failed, of):
            promotion.stopped = f"{failed} of {of} sites it was promoted at went back from it by themselves"

    def discard(self, ref: AdapterRef, sites: Collection[str], *, answering: Collection[str] = ()) -> None:
        """Unload a version at the sites that are online; a site that is away unloads it with its next shadow.

        Sites where it may be `answering` users are rolled back to the version before it.
        """

        def begin(site: str, _: Hello) -> dialogues.Dialogue[Any, ShadowReport]:
            if site in answering:
                return dialogues.withdraw(ref.name, str(ref))
            return dialogues.discard(str(ref))

        self._exchange.converse(
            begin,
            self._deadline(),
            group=f"discard {ref}",
            sites=set(sites) & self._exchange.roster.sites.keys(),
        )

    def _deadline(self) -> float:
        return self._exchange.clock() + self._grace_s


def for_site(hello: Hello, manifest: AdapterManifest, version: Adapter, kin: str) -> tuple[AdapterManifest, bytes]:
    """Return the manifest and bytes for a site: the best approximation at the rank that it can hold.

    A version that was published before the run had `mixed-bases` says its `kin` to sites of another base only, so that
    the others are sent what they may have already.
    """
    own = manifest.joined_rank - manifest.rank  # a site serves both as one adapter
    received = version.at_rank(max(1, hello.max_lora_rank - own))  # a site that can hold no rank refuses by itself
    # A site's measurements are for the centre only; its reason to skip a round tells them, too.
    changes: dict[str, object] = {"site_metrics": {}, "counts": {}, "skipped": {}}
    if hello.fingerprint.digest != manifest.base:
        changes["kin"] = kin
    if received is not version:
        changes |= {"digest": received.digest, "rank": received.rank, "truncation_of": manifest.digest}
    return manifest.model_copy(update=changes), received.blob


def accepts(report: ShadowReport) -> bool:
    """Tell whether a site is in favour; a site where the version is live already has been."""
    return report.state is Lifecycle.LIVE or (report.verdict is not None and report.verdict.accepted)


def _in_words(report: ShadowReport) -> str:
    verdict = report.verdict
    reasons = "; ".join(verdict.reasons) if verdict else ""
    against = "undecided" if verdict and verdict.decision == "keep" else "rejected"
    return ("accepted" if accepts(report) else against) + (f": {reasons}" if reasons else "")
