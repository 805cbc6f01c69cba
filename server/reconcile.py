"""`reconcile`: bring the sites that are online to the version that is `live` in the registry.

So an operator's roll-back reaches the fleet, and a site that was away at a promotion catches up. A site that rejected
the version, or rolled itself back from it, is left alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server import dialogues
from server.dialogues import Sites
from server.keyring import Keyring
from server.registry.registry import LIVE, AdapterRegistry
from server.rollout import for_site
from server.seen_live import SeenLive
from strategies.adapter import Adapter
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.messages import Hello, Restored

ASK_S = 30.0
"""Seconds that a site has, between rounds, to say which version is live there; a silent site waits until next time."""

REFUSAL = "Conflict"
"""Error type of a site that refuses a version by its own policy; any other type, as for a missing signature, fails."""


@dataclass(frozen=True)
class Reconciled:
    """The sites that were asked, by the outcome."""

    live: str
    """The version that should be live at every site."""
    already: tuple[str, ...] = ()
    """Sites where it was live before, or was seen to be."""
    brought: dict[str, str] = field(default_factory=dict)
    """Site that was changed → version that was live there before; "base" for the base."""
    kept: dict[str, str] = field(default_factory=dict)
    """Site that refuses the version → its reason."""
    missed: dict[str, str] = field(default_factory=dict)
    """Site that could not be reached or changed → reason; it is tried again the next time."""


def reconcile(
    exchange: Sites, registry: AdapterRegistry, keys: Keyring, name: str, seen: SeenLive, *, ask_s: float,
    grace_s: float, kin: str = "",
) -> Reconciled | None:  # fmt: skip
    """Bring the sites that are online to the registry's `live`; return None while there is none.

    Sites that were `seen` to serve it are not asked, nor those that say hello meanwhile; `seen` learns of them all.

    A site where the version of a round under way is live is left to that round. Sites have `ask_s` seconds to say which
    version is live, and `grace_s` seconds to follow. `kin` is what the bases have in common that may serve it, in a run
    with `mixed-bases`.
    """
    wanted = registry.aliases(name).get(LIVE)
    if wanted is None:
        return None
    target = str(wanted) if wanted.version else None  # v0 is untrained and changes nothing: the base stands for it
    before = exchange.roster.hellos
    some, all_of_them = exchange.clock() + grace_s, exchange.clock() + ask_s
    exchange.gather(lambda sites: exchange.roster.settled or bool(sites and exchange.clock() >= all_of_them), some)
    known, heard = seen.at(target), exchange.roster.heard_since(before)
    asked = exchange.converse(
        lambda site, _: dialogues.hello(site, name, keys), exchange.clock() + ask_s, group="reconcile",
        sites=exchange.roster.sites.keys() - known - heard.keys(),
    )  # fmt: skip
    said = heard | asked.answers
    open_rounds = _under_way(registry, name)
    apart = {site: hello for site, hello in said.items() if hello.live != target and hello.live not in open_rounds}
    against = {site: hello for site, hello in apart.items() if target in hello.refused}
    pushed: set[str] = set()
    outcome = exchange.converse(
        _bring(registry, wanted, target, kin, pushed), exchange.clock() + grace_s, group=f"restore {wanted}",
        sites=apart.keys() - against.keys(),
    )  # fmt: skip
    refusing = {site for site, why in outcome.left_out.items() if why.startswith(REFUSAL)} - outcome.late
    failing = outcome.left_out.keys() - refusing
    exchange.converse(  # a version that a site loaded and then refused does not stay loaded
        lambda *_: dialogues.discard(str(wanted)), exchange.clock() + grace_s, group=f"discard {wanted}",
        sites=(outcome.left_out.keys() - outcome.late) & pushed,
    )  # fmt: skip
    kept = dict.fromkeys(against, f"it has rejected {wanted}, or went back from it by itself")
    already = known | {site for site, hello in said.items() if hello.live == target}
    seen.note(already | outcome.answers.keys(), target)
    return Reconciled(
        str(wanted),
        already=tuple(sorted(already)),
        brought={site: apart[site].live or "base" for site in sorted(outcome.answers)},
        kept=kept | {site: outcome.left_out[site] for site in sorted(refusing)},
        missed=asked.left_out | {site: outcome.left_out[site] for site in sorted(failing)},
    )


def _bring(
    registry: AdapterRegistry, wanted: AdapterRef, target: str | None, kin: str, pushed: set[str]
) -> Callable[[str, Hello], dialogues.Dialogue[Any, Restored]]:
    """Return a dialogue per site. Weights are read when a first site lacks them; `pushed` collects such sites."""

    @functools.cache
    def version() -> tuple[AdapterManifest, Adapter]:
        blob, manifest = registry.read(wanted)
        return manifest, Adapter.of(blob, manifest.base)

    def begin(site: str, hello: Hello) -> dialogues.Dialogue[Any, Restored]:
        def weights() -> tuple[AdapterManifest, bytes, str]:
            received, blob = for_site(hello, *version(), kin)
            pushed.add(site)
            return received, blob, registry.sign(received)

        return dialogues.restore(wanted.name, target, weights)

    return begin


def _under_way(registry: AdapterRegistry, name: str) -> set[str | None]:
    """Return the versions of rounds that are not over and that no operator has overruled: they may become live."""
    return {
        str(AdapterRef(name, record.version))
        for record in registry.rounds.all(name)
        if record.version is not None and not record.state.final and not registry.overruled(name, record.round)
    }
