"""`Quorum`: waits for enough sites that agree on the base, and holds every site to what the registry pinned."""

from server.config import RunConfig
from server.dialogues import Sites
from server.keyring import Keyring
from server.registry.pin import Pin
from server.registry.registry import HEAD, AdapterRegistry
from strategies.rule import Rule
from umbel.base.origin import kin_of
from umbel.errors import ConfigError, NotFound, UmbelError
from umbel.messages import Hello


class Quorum:
    """The sites that may take part in one run.

    Raises ConfigError for a run whose rank is not the registry's.
    """

    def __init__(
        self, config: RunConfig, registry: AdapterRegistry, exchange: Sites, keys: Keyring, strategy: Rule
    ) -> None:
        self._config = config
        self._name = config.adapter
        self._registry = registry
        self._exchange = exchange
        self._keys = keys
        self._strategy = strategy
        self._require(registry.pin(self._name))

    def gather(self) -> bool:
        """Wait until a quorum of sites agrees, at most `grace-seconds`; return whether it does.

        The first quorum decides what the registry pins. Raises NotFound when no site was ever there.
        """
        deadline = self._exchange.clock() + self._config.grace_seconds
        pin = self._registry.pin(self._name)
        enough = self._exchange.gather(lambda sites: self._agreed(pin, sites) is not None, deadline)
        if not self._exchange.roster.sites and not self._registry.versions(self._name):
            raise NotFound(
                f"no site that serves {self._name!r} was found within {self._config.grace_seconds:g} s; are the "
                "SuperNodes connected to this SuperLink, and is `umbel serve` running beside each? "
                + "; ".join(f"{who}: {why}" for who, why in self._exchange.roster.troubles.items())
            )
        agreed = self._agreed(pin, self._exchange.roster.sites) if enough else None
        # A registry with a pin and no head was cut off inside `begin`, which is then called again.
        if agreed is not None and (pin is None or HEAD not in self._registry.aliases(self._name)):
            self._registry.begin(self._name, agreed, self._config.seed)
            self._require(agreed)
        return enough

    @property
    def kin(self) -> str:
        """Return the kin of the bases that take part; empty unless this run has `mixed-bases` and it is known."""
        pin = self._registry.pin(self._name)
        return pin.shared if pin is not None and self._config.mixed_bases else ""

    def shortfall(self) -> dict[str, str]:
        """Site → why it does not take part or where it differs; "*" says how many were there."""
        there = self._exchange.roster.sites
        found = f"{len(there)} of {self._config.quorum} sites needed were there"
        return {**self._exchange.roster.troubles, **self._disagreements(there), "*": found}

    def _agreed(self, pin: Pin | None, sites: dict[str, Hello]) -> Pin | None:
        """Return the pin that a quorum of sites matches; before there is one, that of a site which a quorum matches.

        In a run with `mixed-bases` a site whose base is not packed comes first, then one that says an origin.
        """
        hellos = list(sites.values())
        if pin is not None:
            return pin if len(hellos) >= self._config.quorum else None
        if self._config.mixed_bases:
            hellos.sort(key=lambda hello: (hello.packing != "", kin_of(hello.fingerprint, hello.kin) == ""))

        def has_quorum(one: Pin) -> bool:
            return sum(self._fits(one, hello) for hello in hellos) >= self._config.quorum

        return next(filter(has_quorum, (Pin.of(hello, self._config.rank) for hello in hellos)), None)

    def _fits(self, pin: Pin, hello: Hello) -> bool:
        try:
            pin.require(hello, self._name, mixed_bases=self._config.mixed_bases)
        except UmbelError:
            return False
        return True

    def _require(self, pin: Pin | None) -> None:
        """Hold the sites to the pin, or, before there is one, to being able to take part at all."""
        training = self._config.rounds > 0
        if training and pin is not None and pin.rank != self._config.rank:
            raise ConfigError(
                f"rank = {self._config.rank}, but {self._name} in {self._registry.root} has rank {pin.rank}; "
                f"run with rank={pin.rank}, or with another registry"
            )

        personal = self._strategy.personal

        def admit(hello: Hello) -> None:
            held = pin or Pin.of(hello, self._config.rank)
            held.require(hello, self._name, mixed_bases=self._config.mixed_bases)
            if training:
                held.require_rank(hello, mixed=self._strategy.mixed_ranks, own=personal.rank if personal else 0)

        self._exchange.roster.require(admit, self._keys)

    def _disagreements(self, sites: dict[str, Hello]) -> dict[str, str]:
        """Site → how its base differs from that of the first site in the order of names."""
        reasons: dict[str, str] = {}
        first = min(sites, default="")
        for site, hello in sites.items():
            pin = Pin.of(sites[first], self._config.rank)
            try:
                pin.require_base(hello, here=f"site {first}", mixed_bases=self._config.mixed_bases)
            except UmbelError as difference:
                reasons[site] = str(difference)
        return reasons
