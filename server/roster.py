"""`Roster`: the sites that take part, and the SuperNode that speaks for each.

A site is known by the name in its hello: without node authentication a SuperNode's id changes with every restart. With
`site-keys` the hello is signed, by the key that the centre has for that name and for a nonce of the centre.
"""

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from server.dialogues import refusal
from server.keyring import Keyring, new_nonce
from server.mailbox import Answer, Broken, Letter, Lost
from strategies.records import pack, unpack
from umbel.errors import UmbelError, WireError
from umbel.messages import Failure, Hello, HelloQuery
from umbel.statements import HelloStatement

log = logging.getLogger("umbel")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 15.0
"""Seconds between two hellos to a node whose site does not answer yet: doubled each time, up to the longest."""


@dataclass
class _Node:
    name: str = ""
    """The first name it said. It has no other one until it is offline."""
    asked: bool = False
    nonce: str = ""
    """Nonce of the last hello that the node was asked for."""
    answered: bool = False
    """True once the node has answered anything, even that its site does not answer."""
    due: float = 0.0
    pause: float = _FIRST_PAUSE_S
    hello: Hello | None = None
    """Last hello of its site, in that name and signed where keys are required."""
    number: int = 0
    """Number of that hello."""
    trouble: str = ""
    """Reason why the node's site is not known yet, or may not take part."""
    barred: bool = False
    """True where nothing that it says ends its trouble: it has changed its name."""


class Roster:
    """Keeps the nodes that are online, and the sites they speak for in a run of `adapter`. `clock` is in seconds.

    A name belongs to a node only while the node's current hello says that name, and is not refused. `keys` are those
    that hellos have to be signed with; without any, whoever says a free name first has it.
    """

    def __init__(self, adapter: str, clock: Callable[[], float]) -> None:
        self._adapter = adapter
        self._clock = clock
        self._nodes: dict[int, _Node] = {}
        self._holders: dict[str, int] = {}
        self._admit: Callable[[Hello], None] = lambda hello: None
        self._keys = Keyring(None)
        self.hellos = 0

    def require(self, admit: Callable[[Hello], None], keys: Keyring | None = None) -> None:
        """Check every site, also those already known, with `admit`, which raises UmbelError to refuse one.

        Hellos that come from now on have to be signed with `keys`.
        """
        self._admit = admit
        self._keys = keys or self._keys
        for node in self._nodes.values():
            if node.hello is not None and not node.barred:
                node.trouble = refusal(self._admit, node.hello)
        self._assign()

    @property
    def sites(self) -> dict[str, Hello]:
        """The sites that are online and admitted."""
        sites = {}
        for site, node_id in self._holders.items():
            hello = self._nodes[node_id].hello
            assert hello is not None, "a name belongs to a node whose hello says it"
            assert hello.site == site, "a name belongs to a node whose hello says it"
            sites[site] = hello
        return sites

    def heard_since(self, hellos: int) -> dict[str, Hello]:
        """Return the admitted sites whose hello came after the first so many `hellos`."""
        return {site: hello for site, hello in self.sites.items() if self._nodes[self._holders[site]].number > hellos}

    @property
    def troubles(self) -> dict[str, str]:
        """Site (or node, while its site is not known, or is another node) → reason why it does not take part."""
        return {
            node.name if node.name and node.name not in self._holders else f"node {node_id}": node.trouble
            for node_id, node in self._nodes.items()
            if node.trouble
        }

    @property
    def settled(self) -> bool:
        """True when every node that is online has answered something; False while there is none."""
        return bool(self._nodes) and all(node.answered for node in self._nodes.values())

    def node_of(self, site: str) -> int | None:
        """Return the node that speaks for a site; None while the site is away or refused."""
        return self._holders.get(site)

    def see(self, online: Collection[int]) -> list[Letter]:
        """Take note of the nodes that are online; return the hellos to send."""
        for gone in self._nodes.keys() - set(online):
            del self._nodes[gone]
        for node_id in online:
            self._nodes.setdefault(node_id, _Node())
        self._assign()
        letters = []
        for node_id, node in self._nodes.items():
            wanted = (node.hello is None or node.trouble) and not node.barred
            if wanted and not node.asked and self._clock() >= node.due:
                node.asked, node.nonce = True, new_nonce()
                query = pack(HelloQuery(adapter=self._adapter, nonce=node.nonce))
                letters.append(Letter(("hello", node_id), node_id, "query.hello", query))
        return letters

    def hear(self, node_id: int, answer: Answer) -> None:
        """Take note of a node's answer to its hello."""
        node = self._nodes.get(node_id)
        if node is None or node.barred:
            return
        node.asked, node.answered = False, True
        node.due, node.pause = self._clock() + node.pause, min(2 * node.pause, _LONGEST_PAUSE_S)
        heard = _hello(answer)
        before, node.trouble = node.trouble, heard if isinstance(heard, str) else self._take(node, heard)
        if node.trouble and node.trouble != before:
            log.warning("node %d does not take part: %s", node_id, node.trouble)
        if isinstance(heard, str):
            return
        holder = self._holders.get(heard.site, node_id)
        if holder != node_id and not node.trouble:
            log.warning(
                "node %d says it is site %s, which node %d is already; it has to wait until that one is offline "
                "(two sites need two names)", node_id, heard.site, holder,
            )  # fmt: skip
        self._assign()

    def rename(self, site: str, said: str) -> None:
        """Refuse the node that speaks for a site, and now says that it is another one, until it is offline."""
        node_id = self._holders.get(site)
        if node_id is not None:
            node = self._nodes[node_id]
            node.trouble = self._bar(node, said)
            log.warning("node %d does not take part: %s", node_id, node.trouble)
            self._assign()

    def _take(self, node: _Node, heard: Hello) -> str:
        """Take in what a node's site says of itself; return the reason why it does not take part, empty for none."""
        node.name = node.name or heard.site
        if heard.site != node.name:
            return self._bar(node, heard.site)
        try:
            self._keys.require(heard.site, HelloStatement.of(node.nonce, heard), heard.signature)
        except UmbelError as unproven:
            node.hello = None
            return str(unproven)
        self.hellos += 1
        node.hello, node.number = heard, self.hellos
        return refusal(self._admit, heard)

    def _bar(self, node: _Node, said: str) -> str:
        node.hello, node.barred = None, True
        return (
            f"it said that it is site {node.name}, and then {said}; a SuperNode has one name until it "
            "reconnects: if the new one is right, stop its `umbel supernode` for a minute and start it again"
        )

    def _assign(self) -> None:
        """Take names from nodes that may not have them; give a free name to the newest node that claims it."""
        self._holders = {site: node_id for site, node_id in self._holders.items() if self._claims(node_id) == site}
        for node_id in reversed(self._nodes):
            site = self._claims(node_id)
            if site is not None:
                self._holders.setdefault(site, node_id)

    def _claims(self, node_id: int) -> str | None:
        """Return the name that a node may have; None for a node that is offline, not known yet, or refused."""
        node = self._nodes.get(node_id)
        return node.hello.site if node is not None and node.hello is not None and not node.trouble else None


def _hello(answer: Answer) -> Hello | str:
    """Return the hello in an answer, or the fault of the answer in words."""
    if isinstance(answer, Lost | Broken):
        return answer.reason
    try:
        hello = unpack(answer, Hello)
    except WireError as nonsense:
        return str(nonsense)
    if isinstance(hello, Failure):
        return hello.error
    return hello if _NAME.fullmatch(hello.site) else f"{hello.site[:80]!r} cannot name a site"
