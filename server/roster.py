"""`Roster`: the sites that take part, and the SuperNode that speaks for each.

A site is known by the name in its hello: without node authentication a SuperNode's id changes with every restart.
"""

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from flwr.app import RecordDict

from server.mailbox import Answer, Broken, Letter, Lost
from strategies.records import unpack
from umbel.errors import UmbelError, WireError
from umbel.messages import Failure, Hello

log = logging.getLogger("umbel")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 15.0
"""Seconds between two hellos to a node whose site does not answer yet: doubled each time, up to the longest."""


@dataclass
class _Node:
    asked: bool = False
    answered: bool = False
    """True once the node has answered anything, even that its site does not answer."""
    due: float = 0.0
    pause: float = _FIRST_PAUSE_S
    hello: Hello | None = None
    trouble: str = ""
    """Reason why the node's site is not known yet, or may not take part."""


class Roster:
    """Keeps the nodes that are online, and the sites they speak for. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nodes: dict[int, _Node] = {}
        self._holders: dict[str, int] = {}
        self._admit: Callable[[Hello], None] = lambda hello: None

    def require(self, admit: Callable[[Hello], None]) -> None:
        """Check every site, also those already known, with `admit`, which raises UmbelError to refuse one."""
        self._admit = admit
        for node in self._nodes.values():
            if node.hello is not None:
                node.trouble = self._refusal(node.hello)

    @property
    def sites(self) -> dict[str, Hello]:
        """The sites that are online and admitted."""
        held = {site: self._nodes[node_id] for site, node_id in self._holders.items()}
        return {site: node.hello for site, node in held.items() if node.hello is not None and not node.trouble}

    @property
    def troubles(self) -> dict[str, str]:
        """Site (or node, while its site is not known) → reason why it does not take part."""
        return {
            node.hello.site if node.hello else f"node {node_id}": node.trouble
            for node_id, node in self._nodes.items()
            if node.trouble and (node.hello is None or self._holders.get(node.hello.site) == node_id)
        }

    @property
    def settled(self) -> bool:
        """True when every node that is online has answered something; False while there is none."""
        return bool(self._nodes) and all(node.answered for node in self._nodes.values())

    def node_of(self, site: str) -> int | None:
        """Return the node that speaks for a site; None while the site is away."""
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
            if (node.hello is None or node.trouble) and not node.asked and self._clock() >= node.due:
                node.asked = True
                letters.append(Letter(("hello", node_id), node_id, "query.hello", RecordDict()))
        return letters

    def hear(self, node_id: int, answer: Answer) -> None:
        """Take note of a node's answer to its hello."""
        node = self._nodes.get(node_id)
        if node is None:
            return
        node.asked, node.answered = False, True
        node.due, node.pause = self._clock() + node.pause, min(2 * node.pause, _LONGEST_PAUSE_S)
        heard = _hello(answer)
        before, node.trouble = node.trouble, heard if isinstance(heard, str) else self._refusal(heard)
        if node.trouble and node.trouble != before:
            log.warning("node %d does not take part: %s", node_id, node.trouble)
        if isinstance(heard, str):
            return
        node.hello = heard
        holder = self._holders.get(heard.site, node_id)
        if holder != node_id:
            log.warning(
                "node %d says it is site %s, which node %d is already; it has to wait until that one is offline "
                "(two sites need two names)", node_id, heard.site, holder,
            )  # fmt: skip
        self._assign()

    def _refusal(self, hello: Hello) -> str:
        try:
            self._admit(hello)
        except UmbelError as refusal:
            return str(refusal)
        return ""

    def _assign(self) -> None:
        """Keep each online node's site name; give a free name to the newest node that claims it."""
        self._holders = {site: node for site, node in self._holders.items() if node in self._nodes}
        for node_id, node in reversed(self._nodes.items()):
            if node.hello is not None:
                self._holders.setdefault(node.hello.site, node_id)


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
