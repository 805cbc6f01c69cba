"""Dialogues with one site, as generators: each yields a `Request` and is sent the `Reply`. `Sites` holds them.

The exchange sends lost messages again, so dialogues are written as if nothing were ever lost. A dialogue returns its
result, or raises SiteFailure with the reason why the site is left out.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel

from server.keyring import Keyring, new_nonce
from strategies.adapter import Update
from umbel.adapter import AdapterManifest, Lifecycle
from umbel.errors import UmbelError
from umbel.messages import (
    AdapterQuery,
    Hello,
    HelloQuery,
    JobState,
    LiveVersion,
    Restore,
    Restored,
    RoundOrder,
    RoundQuery,
    RoundReport,
    Shadow,
    ShadowReport,
    Submit,
    VersionQuery,
)
from umbel.statements import HelloStatement, VerdictStatement

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

POLL_S = 2.0
"""Seconds between two questions about the same work; each question starts a process at the site."""


class SiteFailure(UmbelError):
    """A site is left out of the rest of the dialogue; the message is the reason."""


class NameChanged(SiteFailure):
    """A node that speaks for one site says that it is another one, `said`."""

    def __init__(self, site: str, said: str) -> None:
        super().__init__(f"its SuperNode says now that it is site {said[:80]!r}, not {site}")
        self.said = said[:80]


@dataclass(frozen=True)
class Request(Generic[M]):
    """One Flower message to a site."""

    message_type: str
    body: BaseModel | None
    expects: type[M]
    adapter: bytes | None = None
    delay: float = 0.0
    """Seconds to wait before the request is sent."""
    fetch: Literal["no", "if few", "yes"] = "no"
    """Sets `body.fetch`, by which an answer brings an adapter; "if few": where so few sites are asked that all may
    bring one at once. The exchange has only a few such requests under way at a time."""


@dataclass(frozen=True)
class Reply(Generic[M]):
    """A site's answer."""

    body: M
    adapter: bytes | None = None


Dialogue = Generator[Request[M], Reply[M], T]


@dataclass(frozen=True)
class Skipped:
    """A site's answer to an order that nothing is worth training there now; its report says why."""

    report: RoundReport


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of a conversation."""

    answers: dict[str, T] = field(default_factory=dict)
    """Site → result."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Site → reason why it has no result."""
    late: frozenset[str] = frozenset()
    """Sites in `left_out` that did not fail: they had not answered by the end."""


class Roster(Protocol):
    """The sites that are there: `server.roster.Roster` for Flower's nodes, `server.alone.OnlySite` for one site."""

    hellos: int
    """Hellos that were heard, of all sites."""

    @property
    def sites(self) -> dict[str, Hello]:
        """The sites that are online and admitted."""

    @property
    def troubles(self) -> dict[str, str]:
        """Site → reason why it does not take part."""

    @property
    def settled(self) -> bool:
        """True when every one that is online has answered something."""

    def heard_since(self, hellos: int) -> dict[str, Hello]:
        """Return the admitted sites whose hello came after the first so many `hellos`."""

    def node_of(self, site: str) -> int | None:
        """Return a number that changes when a site connects anew; None while the site is away or refused."""

    def require(self, admit: Callable[[Hello], None], keys: Keyring | None = None) -> None:
        """Check every site with `admit`, which raises UmbelError to refuse one, and hellos that come with `keys`."""


def refusal(admit: Callable[[Hello], None], hello: Hello) -> str:
    """Return why `admit` refuses a site, empty where it does not."""
    try:
        admit(hello)
    except UmbelError as refused:
        return str(refused)
    return ""


class Sites(Protocol):
    """Holds dialogues with sites: `server.exchange.Exchange` over Flower, `server.alone.Direct` over a socket."""

    @property
    def roster(self) -> Roster: ...

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds; deadlines are points on it."""

    @property
    def sent(self) -> Counter[int]:
        """Node → messages that it was sent."""

    def gather(self, enough: Callable[[dict[str, Hello]], bool], deadline: float) -> bool:
        """Wait until the admitted sites are `enough`; return False if they are not by the deadline."""

    def converse(
        self, begin: Callable[[str, Hello], Dialogue[M, T]], deadline: float, *, group: str,
        sites: Collection[str] | None = None, enough: Callable[[Mapping[str, T]], bool] = ...,
        open: Callable[[], bool] = ...,
    ) -> Outcome[T]:  # fmt: skip
        """Hold one dialogue with each site until all are over, the answers are `enough`, or the deadline passes."""


def submit(order: Submit, parent: bytes) -> Dialogue[RoundReport, Reply[RoundReport]]:
    """Give a site a round to train, from the safetensors bytes `parent`; return the answer, perhaps with the update."""
    return (yield Request("train.submit", order, RoundReport, parent, fetch="if few"))


def collect(
    site: str, base: str, adapter: str, order: RoundOrder, reply: Reply[RoundReport] | None = None
) -> Dialogue[RoundReport, Update | Skipped]:
    """Wait for a round that a site was given, and fetch the update. `base` is the digest of the base it is for.

    A site that has nothing worth training says so in place of an update.

    `reply` is the answer to the order, where it was sent just now. Raises SiteFailure when the training failed, or the
    site answers for another round.
    """
    query = RoundQuery(adapter=adapter, key=order.key)
    while reply is None or not _is_over(reply.body, order):
        reply = yield Request("query.collect", query, RoundReport, delay=POLL_S, fetch="if few")
    if reply.body.state is JobState.SKIPPED:
        return Skipped(reply.body)
    if reply.adapter is None:
        reply = yield Request("query.collect", query, RoundReport, fetch="yes")
    if reply.adapter is None or not _is_over(reply.body, order):
        raise SiteFailure("said that its round was done, and sent no update")
    return Update(site, reply.adapter, reply.body, base)


def _is_over(report: RoundReport, order: RoundOrder) -> bool:
    if report.key != order.key:
        raise SiteFailure(f"answered for round {report.key!r}, asked was {order.key!r}")
    if report.state in (JobState.FAILED, JobState.CANCELLED):
        raise SiteFailure(f"training {report.state}: {report.error or 'no reason given'}")
    return report.state in (JobState.DONE, JobState.SKIPPED)


def shadow(
    site: str, keys: Keyring, manifest: AdapterManifest, blob: bytes, signature: str
) -> Dialogue[ShadowReport, ShadowReport]:
    """Have a version loaded beside the live one and measured; return the report with the site's verdict.

    Raises SiteFailure for a verdict that the site did not sign for this question, version and registry.
    """
    ref, nonce = str(manifest.ref), new_nonce()
    push = Shadow(manifest=manifest, signature=signature, nonce=nonce)
    reply = yield Request("query.shadow", push, ShadowReport, blob)
    while True:
        report = reply.body
        if report.ref != ref:
            raise SiteFailure(f"answered for {report.ref}, asked was {ref}")
        if report.verdict is not None or report.state is Lifecycle.LIVE:
            _require(keys, site, VerdictStatement.of(site, nonce, manifest, report), report.signature)
            return report
        if report.state in (Lifecycle.REJECTED, Lifecycle.RETIRED):
            raise SiteFailure(f"{ref} is {report.state} there, without a verdict")
        reply = yield Request("query.collect", VersionQuery(ref=ref, nonce=nonce), ShadowReport, delay=POLL_S)


def promote(ref: str) -> Dialogue[ShadowReport, ShadowReport]:
    """Make a shadow the live version of the site; return when it is."""
    reply = yield Request("query.promote", VersionQuery(ref=ref), ShadowReport)
    while reply.body.state is not Lifecycle.LIVE:
        if reply.body.state in (Lifecycle.REJECTED, Lifecycle.RETIRED):
            raise SiteFailure(f"{ref} is {reply.body.state} there, not live")
        reply = yield Request("query.collect", VersionQuery(ref=ref), ShadowReport, delay=POLL_S)
    return reply.body


def discard(ref: str) -> Dialogue[ShadowReport, ShadowReport]:
    """Have a shadow unloaded."""
    reply = yield Request("query.discard", VersionQuery(ref=ref), ShadowReport)
    return reply.body


def hello(site: str, adapter: str, keys: Keyring) -> Dialogue[Hello, Hello]:
    """Ask for a site's current hello about an adapter; the exchange asks for one only when it first sees a node.

    Raises NameChanged for the hello of another site, SiteFailure for one that the site did not sign for this question.
    """
    nonce = new_nonce()
    reply = yield Request("query.hello", HelloQuery(adapter=adapter, nonce=nonce), Hello)
    said = reply.body
    if said.site != site:
        raise NameChanged(site, said.site)
    _require(keys, site, HelloStatement.of(nonce, said), said.signature)
    return said


def _require(keys: Keyring, site: str, statement: HelloStatement | VerdictStatement, signature: str) -> None:
    try:
        keys.require(site, statement, signature)
    except UmbelError as refusal:
        raise SiteFailure(str(refusal)) from refusal


def restore(
    adapter: str, ref: str | None, weights: Callable[[], tuple[AdapterManifest, bytes, str]]
) -> Dialogue[Any, Restored]:
    """Have a version (None: the base) answer users, unless the site refuses it, which ends this as a failure.

    `weights` returns manifest, safetensors bytes and signature; it is called only for a site that lacks them.
    """
    order = Restore(adapter=adapter, ref=ref)
    reply = yield Request("query.restore", order, Restored)
    if reply.body.live != ref and reply.body.state is None:
        manifest, blob, signature = weights()
        yield Request("query.shadow", Shadow(manifest=manifest, signature=signature), ShadowReport, blob)
        reply = yield Request("query.restore", order, Restored)
    while reply.body.live != ref:
        if reply.body.state is None:
            raise SiteFailure(f"took the weights of {ref}, and does not have them")
        reply = yield Request("query.restore", order, Restored, delay=POLL_S)
    answer: Restored = reply.body
    return answer


def withdraw(adapter: str, ref: str) -> Dialogue[Any, ShadowReport]:
    """Roll a site back from a version that may be live there already, to the version before it."""
    yield Request("query.rollback", AdapterQuery(adapter=adapter, instead_of=ref), LiveVersion)
    reply = yield Request("query.collect", VersionQuery(ref=ref), ShadowReport)
    if reply.body.state not in (Lifecycle.LIVE, Lifecycle.RETIRED, Lifecycle.REJECTED):
        reply = yield Request("query.discard", VersionQuery(ref=ref), ShadowReport)
    report: ShadowReport = reply.body
    return report
