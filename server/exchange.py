"""`Exchange`: holds dialogues with all sites at once over Flower's Grid.

A lost message is sent again; a site that fails is left out of the conversation.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

from flwr.serverapp import Grid
from pydantic import BaseModel

from server.dialogues import Dialogue, NameChanged, Outcome, Reply, Request, SiteFailure
from server.mailbox import TTL_S, Answer, Broken, Letter, Lost, Mailbox
from server.roster import Roster
from strategies.records import pack, unpack, unpack_adapter
from umbel.errors import WireError
from umbel.messages import Failure, Hello

log = logging.getLogger("umbel")

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

PULL_S = 0.5
"""Seconds between two looks for replies."""
NODES_S = 1.0
"""Seconds between two looks at the nodes that are online."""
RETRY_S = 3.0
"""Seconds before a site that answered that it is not ready is asked again; a lost message is resent at once."""
DOWNLOADS = 8
"""Most adapters on their way from the sites at a time; the SuperLink holds each until it is pulled."""


class Exchange:
    """Talks to the sites of one adapter. `clock` and `sleep` are in seconds; deadlines are points on `clock`.

    >>> exchange = Exchange(grid, "support")
    >>> exchange.gather(lambda sites: len(sites) >= 2, exchange.clock() + 60)
    >>> asked = exchange.converse(lambda site, _: dialogues.hello(site, "support", keys), exchange.clock() + 30,
    ...                            group="round 1")
    >>> asked.answers, asked.left_out
    """

    def __init__(
        self,
        grid: Grid,
        adapter: str,
        *,
        ttl: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        downloads: int = DOWNLOADS,
    ) -> None:
        self.roster = Roster(adapter, clock)
        self.clock = clock
        self.sent: Counter[int] = Counter()
        """Node → messages that it was sent."""
        self._sleep = sleep
        self._grid = grid
        self._downloads = downloads
        self._mailbox = Mailbox(grid, ttl=ttl, clock=clock)
        self._online: list[int] = []
        self._next_look = clock()

    def gather(self, enough: Callable[[dict[str, Hello]], bool], deadline: float) -> bool:
        """Wait until the admitted sites that are online are `enough`; return False if they are not by the deadline."""
        while not enough(self.roster.sites):
            if self.clock() >= deadline:
                return False
            self._turn({}, "hello")
            self._sleep(PULL_S)
        return True

    def converse(
        self,
        begin: Callable[[str, Hello], Dialogue[M, T]],
        deadline: float,
        *,
        group: str,
        sites: Collection[str] | None = None,
        enough: Callable[[Mapping[str, T]], bool] = lambda answers: False,
        open: Callable[[], bool] = lambda: True,
    ) -> Outcome[T]:
        """Hold one dialogue with each site until all are over, the answers are `enough`, or the deadline passes.

        Without `sites`: with every site that is online, and with sites that come while others still talk and it is
        `open`. A site that goes away is waited for. `begin` gets a site's name and its hello. `group` is Flower's group
        id. Results are kept until the end, so a dialogue that fetches something large uses it and returns something
        small.
        """
        talks: dict[str, _Talk[M, T]] = {}
        answers: dict[str, T] = {}
        while sites is None or sites:
            for site, hello in self.roster.sites.items():
                if site not in talks and (open() if sites is None else site in sites):
                    talks[site] = _Talk(site, begin(site, hello), self.clock())
            self._turn(talks, group)
            begun = bool(talks) and set(sites or ()) <= talks.keys()
            answers = {site: talk.results[0] for site, talk in talks.items() if talk.results}
            over = begun and all(talk.over for talk in talks.values())
            if over or enough(answers) or self.clock() >= deadline:
                break
            self._sleep(PULL_S)
        for site in talks:
            self._mailbox.forget(site)
        left_out = dict.fromkeys(set(sites or ()) - talks.keys(), "its SuperNode is offline")
        left_out |= {site: talk.why_not for site, talk in talks.items() if not talk.results}
        for site, reason in left_out.items():
            log.warning("%s: site %s left out: %s", group, site, reason)
        late = frozenset(site for site, talk in talks.items() if not talk.over)
        return Outcome(answers, left_out, late)

    def _turn(self, talks: "dict[str, _Talk[M, T]]", group: str) -> None:
        """Look at the nodes that are online, send the messages that are due, take in the answers."""
        if self.clock() >= self._next_look:
            self._online = list(self._grid.get_node_ids())
            self._next_look = self.clock() + NODES_S
        letters = self.roster.see(self._online)
        few = len(talks) <= self._downloads
        free = self._downloads - sum(talk.node is not None and talk.fetches for talk in talks.values())
        for talk in talks.values():
            node = self.roster.node_of(talk.site)
            if talk.node not in (None, node):
                self._mailbox.forget(talk.site)
                talk.hear(Lost("its SuperNode went away"), self.clock())
            if node is not None and talk.ready(self.clock()) and (free > 0 or not talk.has_to_fetch):
                letters.append(talk.letter(node, few))
                free -= talk.fetches
        self.sent.update(letter.node_id for letter in letters)
        self._mailbox.send(letters, group)
        for key, answer in self._mailbox.receive(self._online):
            if isinstance(key, tuple):
                self.roster.hear(key[1], answer)
            elif key in talks:
                talk = talks[str(key)]
                talk.hear(answer, self.clock())
                if talk.renamed:
                    self.roster.rename(talk.site, talk.renamed)
            del answer  # frees an adapter before the next one is pulled


class _Talk(Generic[M, T]):
    """One site's dialogue with its next request, and the node that the request was sent to."""

    def __init__(self, site: str, dialogue: Dialogue[M, T], now: float) -> None:
        self.site = site
        self.node: int | None = None
        """Node that the request is on its way to; None while no request is."""
        self.fetches = False
        """True where the request that is on its way asks for an adapter."""
        self.results: list[T] = []
        self.failure = ""
        self.renamed = ""
        """The name that its node says now, if that is another one."""
        self._trouble = ""
        self._dialogue = dialogue
        self._request: Request[M]
        """The next request; unset in a dialogue that was over before it asked anything."""
        self._due = now
        self._go_on(lambda: next(dialogue), now)

    @property
    def over(self) -> bool:
        return bool(self.results or self.failure)

    @property
    def has_to_fetch(self) -> bool:
        return self._request.fetch == "yes"

    @property
    def why_not(self) -> str:
        return self.failure or "no answer by the deadline" + (f" ({self._trouble})" if self._trouble else "")

    def ready(self, now: float) -> bool:
        return not self.over and self.node is None and now >= self._due

    def letter(self, node: int, few: bool) -> Letter:
        """Return the next request for `node`; `few`: every site of this conversation may bring an adapter at once."""
        request, body = self._request, self._request.body
        self.node, self.fetches = node, self.has_to_fetch or (few and request.fetch == "if few")
        if body is not None and self.fetches:
            body = body.model_copy(update={"fetch": True})
        return Letter(self.site, node, request.message_type, pack(body, request.adapter), self.fetches)

    def hear(self, answer: Answer, now: float) -> None:
        self.node = None
        if isinstance(answer, Lost):
            self._trouble, self._due = answer.reason, now
        elif isinstance(answer, Broken):
            self.failure = answer.reason
        else:
            self._read(answer, now)

    def _read(self, content: Any, now: float) -> None:
        try:
            body, adapter = unpack(content, self._request.expects), unpack_adapter(content)
        except WireError as nonsense:
            self.failure = f"answered nonsense: {nonsense}"
            return
        if isinstance(body, Failure):
            self._trouble, self._due = body.error, now + RETRY_S
            self.failure = body.error if body.final else ""
            return
        self._trouble = ""
        self._go_on(lambda: self._dialogue.send(Reply(body, adapter)), now)

    def _go_on(self, step: Callable[[], Request[M]], now: float) -> None:
        try:
            self._request = step()
            self._due = now + self._request.delay
        except StopIteration as end:
            self.results.append(end.value)
        except SiteFailure as reason:
            self.failure = str(reason)
            self.renamed = reason.said if isinstance(reason, NameChanged) else ""
