"""`Alone`: the rounds of one site by itself, without Flower; steps and records are a federation's.

So its registry can become a federation's. `Direct` talks to the site over its control socket; `OwnUpdate` makes the
site's update the next version.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel

from server import loop
from server.config import ALONE, RunConfig
from server.dialogues import Dialogue, NameChanged, Outcome, Reply, Request, SiteFailure, refusal
from server.federation import Federation
from server.keyring import Keyring
from server.registry.events import Events
from server.registry.pin import Pin
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundRecord, RoundState
from strategies.adapter import Adapter
from strategies.fold import Mean
from strategies.own import Own
from strategies.rule import Rule
from umbel.errors import ConfigError, UmbelError
from umbel.messages import Hello, HelloQuery, RoundQuery, Shadow, Submit
from umbel.site.calls import Refused, SiteCalls

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

RETRY_S = 3.0
"""Seconds before a daemon that did not answer, or was not ready, is asked again."""
LOOK_S = 1.0
"""Seconds between two looks, in such a pause, at whether the site has other examples."""
LONGEST_PAUSE_S = {**loop.LONGEST_PAUSE_S, RoundState.FAILED: 300.0}
"""How a round ended → the longest pause after it, in seconds."""


class OwnUpdate(Rule):
    """The rule of a site alone: its update is the next version, to the last bit."""

    name = ALONE

    def mean(self, parent: Adapter) -> Mean:
        return Own()


class OnlySite:
    """The `Roster` of one site: what it last said, and why it does not take part."""

    def __init__(self) -> None:
        self.hellos = 0
        self._hello: Hello | None = None
        self._trouble = ""
        self._connection = 0
        self._admit: Callable[[Hello], None] = lambda hello: None

    @property
    def sites(self) -> dict[str, Hello]:
        return {} if self._hello is None or self._trouble else {self._hello.site: self._hello}

    @property
    def troubles(self) -> dict[str, str]:
        return {self._hello.site if self._hello else "the site": self._trouble} if self._trouble else {}

    @property
    def settled(self) -> bool:
        return self._hello is not None or self._trouble != ""

    def heard_since(self, hellos: int) -> dict[str, Hello]:
        return self.sites if self.hellos > hellos else {}

    def node_of(self, site: str) -> int | None:
        return self._connection if site in self.sites else None

    def require(self, admit: Callable[[Hello], None], keys: Keyring | None = None) -> None:
        """Check the site with `admit`; nothing has to be signed: who may open the socket is who the site trusts."""
        self._admit = admit
        if self._hello is not None:
            self._trouble = refusal(self._admit, self._hello)

    def hear(self, hello: Hello) -> None:
        """Take note of what the site says of itself."""
        self.hellos += 1
        self._hello, self._trouble = hello, refusal(self._admit, hello)

    def lose(self, reason: str) -> None:
        """Take note that the daemon does not answer: it may be another one when it does again."""
        self._hello, self._trouble = None, reason
        self._connection += 1


class Direct:
    """Talks to one site over its control socket, as `server.exchange.Exchange` does to many over Flower.

    `look` is called before each call and each wait; it may raise to end all. `clock` and `sleep` are in seconds.
    """

    def __init__(
        self, site: SiteCalls, adapter: str, *, look: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.roster = OnlySite()
        self.clock = clock
        self.sleep = sleep
        self.sent: Counter[int] = Counter()
        self._site = site
        self._adapter = adapter
        self._look = look

    def hello(self) -> Hello:
        """Return what the site says of itself now; raise ConfigError where it does not answer."""
        try:
            hello = self._site.hello(HelloQuery(adapter=self._adapter))
        except Refused as refused:
            raise ConfigError(refused.failure.error) from refused
        self.roster.hear(hello)
        return hello

    def gather(self, enough: Callable[[dict[str, Hello]], bool], deadline: float) -> bool:
        while not enough(self.roster.sites):
            if self.clock() >= deadline:
                return False
            self._look()
            self._greet()
            if not enough(self.roster.sites):
                self.sleep(RETRY_S)
        return True

    def converse(
        self, begin: Callable[[str, Hello], Dialogue[M, T]], deadline: float, *, group: str,
        sites: Collection[str] | None = None, enough: Callable[[Mapping[str, T]], bool] = lambda answers: False,
        open: Callable[[], bool] = lambda: True,
    ) -> Outcome[T]:  # fmt: skip
        if sites is not None and not sites:
            return Outcome()
        self.gather(lambda there: bool(there if sites is None else there.keys() & set(sites)), deadline)
        away = {site: self._why("it is away") for site in sites or () if site not in self.roster.sites}
        for site, hello in self.roster.sites.items():
            if sites is not None and site not in sites:
                continue
            try:
                return Outcome({site: self._hold(begin(site, hello), site, deadline)}, away)
            except _Late as late:
                return Outcome({}, {**away, site: str(late)}, frozenset({site}))
            except SiteFailure as failure:
                if isinstance(failure, NameChanged):
                    self.roster.lose(str(failure))
                return Outcome({}, {**away, site: str(failure)})
        return Outcome({}, away)

    def _hold(self, dialogue: Dialogue[M, T], site: str, deadline: float) -> T:
        """Hold a dialogue to its end; raise SiteFailure, or _Late at the deadline."""
        reply: Reply[M] | None = None
        while True:
            try:
                request = next(dialogue) if reply is None else dialogue.send(reply)
            except StopIteration as end:
                result: T = end.value
                return result
            if request.delay:
                self.sleep(request.delay)
            reply = self._ask(request, site, deadline)

    def _ask(self, request: Request[M], site: str, deadline: float) -> Reply[M]:
        while self.clock() < deadline:
            self._look()
            self._greet()
            if site in self.roster.sites:
                try:
                    return Reply(*self._call(request))
                except Refused as refused:
                    if refused.failure.final:
                        raise SiteFailure(refused.failure.error) from refused
                    self.roster.lose(refused.failure.error)
                except UmbelError as error:
                    raise SiteFailure(f"{type(error).__name__}: {error}") from error
            self.sleep(RETRY_S)
        raise _Late(self._why("no answer by the deadline"))

    def _greet(self) -> None:
        """Ask the site who it is, where it does not take part yet."""
        if self.roster.sites:
            return
        try:
            self.roster.hear(self._site.hello(HelloQuery(adapter=self._adapter)))
        except Refused as refused:
            self.roster.lose(refused.failure.error)
        except UmbelError as nonsense:
            self.roster.lose(str(nonsense))

    def _call(self, request: Request[M]) -> tuple[Any, bytes | None]:
        """Make one call; an update comes with the report of a finished round, as there is only one site."""
        site, body = self._site, request.body
        self.sent[self.roster.node_of(next(iter(self.roster.sites))) or 0] += 1
        if isinstance(body, Submit):
            return site.submit(body.model_copy(update={"fetch": True}), request.adapter or b"")
        if isinstance(body, RoundQuery):
            return site.round(body.model_copy(update={"fetch": True}))
        if isinstance(body, Shadow):
            return site.shadow(body, request.adapter or b""), None
        calls: dict[str, Callable[[Any], BaseModel]] = {
            "query.hello": site.hello, "query.collect": site.version, "query.promote": site.promote,
            "query.discard": site.discard, "query.rollback": site.roll_back, "query.restore": site.restore,
        }  # fmt: skip
        return calls[request.message_type](body), None

    def _why(self, what: str) -> str:
        return f"{what} ({'; '.join(self.roster.troubles.values())})" if self.roster.troubles else what


class _Late(SiteFailure):
    """The site had not answered by the deadline."""


class Alone:
    """The rounds of one site's adapter, over a registry of its own, or over one that a federation left to it.

    Raises ConfigError for a site that cannot go on with the registry.

    >>> alone = Alone(config, registry, Direct(calls, "support"), Events(registry.root / EVENTS), "adapt-1")
    >>> for record in alone.rounds():
    ...     print(record.round, record.state, record.reasons)
    """

    def __init__(self, config: RunConfig, registry: AdapterRegistry, site: Direct, events: Events, run_id: str) -> None:
        self._config = config
        self._registry = registry
        self._site = site
        self._require(site.hello())
        self._federation = Federation(config, registry, site, events, run_id, OwnUpdate(**config.options))
        self.pause_s = 0.0
        """Seconds before the next round: 0 but after rounds that failed or were idle."""

    def rounds(self) -> Iterator[RoundRecord]:
        """Run the rounds, those first that were interrupted; yield how each ended."""
        for number in self._federation.rounds():
            self._rest()
            loop.run_round(self._federation, number)
            record = self._registry.rounds.find(self._config.adapter, number)
            assert record is not None  # a round ends for a recorded reason
            self.pause_s = loop.longer(self.pause_s, record.state, LONGEST_PAUSE_S)
            yield record

    def _rest(self) -> None:
        """Wait for `pause_s`, or until the site has other examples."""
        over, known = self._site.clock() + self.pause_s, self._changes() if self.pause_s else None
        while (left := over - self._site.clock()) > 0 and self._changes() == known:
            self._site.sleep(min(left, LOOK_S))

    def _changes(self) -> int | None:
        """Return how often the site has changed its examples; None where it does not answer."""
        with suppress(ConfigError):  # the next round says why
            return self._site.hello().data_changes
        return None

    def _require(self, hello: Hello) -> None:
        """Raise ConfigError, BaseMismatch or AdapterError unless the site can go on with what is in the registry."""
        name, root = self._config.adapter, self._registry.root
        if hello.adapter != name:
            raise ConfigError(
                f"the daemon of {hello.site} does not train {name!r}, which its site file names: it was started with "
                "an older one; end it, and start again"
            )
        pin = self._registry.pin(name)
        if pin is not None:
            pin.fingerprint.require_same(
                hello.fingerprint, here=f"{root}", there=f"site {hello.site}",
                remedy="serve the base that these versions were trained on, or begin another registry with "
                "--registry DIR and another [site].state_dir",
            )  # fmt: skip
        held = pin or Pin.of(hello, self._config.rank)
        held.require(hello, name)
        if hello.max_lora_rank < held.rank:
            raise ConfigError(
                f"{name} in {root} has rank {held.rank}, and {hello.site} serves it up to rank {hello.max_lora_rank}; "
                "raise [engine].max_lora_rank (and [[adapter]].rank) there, and restart the site"
            )
        known = {str(manifest.ref) for manifest in self._registry.versions(name)}
        for ref in (hello.live, *hello.refused):
            if ref is not None and ref not in known:
                raise ConfigError(
                    f"{hello.site} has {ref}, and {root} has not: the site's versions are another registry's; go on "
                    "with that one (--registry DIR), or begin anew with another [site].state_dir"
                )
