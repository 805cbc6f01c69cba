"""`SeenLive`: the version that each site was last seen to serve, so that only sites are asked that may have changed."""

from collections.abc import Collection

from server.dialogues import Roster


class SeenLive:
    """Remembers sites by their SuperNode: a site that connects anew may have lost its state.

    A version is named as in a hello, None for the base.

    >>> seen = SeenLive(exchange.roster)
    >>> seen.note({"clinic-a", "shop-a"}, "support@v3")
    >>> seen.forget({"shop-a"})
    >>> seen.at("support@v3")
    {'clinic-a'}
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._seen: dict[str, tuple[int | None, str | None]] = {}

    def note(self, sites: Collection[str], version: str | None) -> None:
        """Remember that `version` answers the users of these sites."""
        self._seen |= {site: (self._roster.node_of(site), version) for site in sites}

    def forget(self, sites: Collection[str]) -> None:
        """Forget sites where another version may be live by now."""
        for site in sites:
            self._seen.pop(site, None)

    def forget_all(self) -> None:
        """Forget every site."""
        self._seen.clear()

    def at(self, version: str | None) -> set[str]:
        """Return the sites that were last seen to serve `version`, and are online since."""
        return {
            site for site, (node, live) in self._seen.items()
            if live == version and node is not None and node == self._roster.node_of(site)
        }  # fmt: skip
