"""`HeldBase`: the base that a site holds, as the site names it to the centre, and the bases that it stands for."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from client.keys import SiteKeys
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import ORIGIN, BaseOrigin
from umbel.base.packed import Packing, packing_of
from umbel.base.shapes import read_config
from umbel.errors import AdapterError, BaseMismatch, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldBase:
    """A base's fingerprint, what bases of its origin have in common, and what its linear layers are packed in.

    >>> base = HeldBase.read(config.model.path, SiteKeys(config.site))
    >>> base.require(f"round {order.key} is for", order.base, order.kin)  # raises BaseMismatch for another base
    """

    fingerprint: BaseFingerprint
    kin: str = ""
    """Empty where the base is packed and says no origin that this site trusts."""
    packing: Packing = ""

    @classmethod
    def read(cls, model: Path, keys: SiteKeys) -> Self:
        """Read and hash a model directory, in about a second per gigabyte. Raises ConfigError or UnsupportedModel."""
        fingerprint = BaseFingerprint.of(model)
        packing = packing_of(read_config(model))
        kin = _trusted_kin(model, fingerprint, keys) if packing else fingerprint.kin
        return cls(fingerprint, kin, packing)

    def accepts(self, base: str, kin: str) -> bool:
        """Tell whether what is for a base, or for all of one `kin` where that is not empty, is for this base."""
        return base == self.fingerprint.digest or (kin != "" and kin == self.kin)

    def require(self, what: str, base: str, kin: str) -> None:
        """Raise BaseMismatch, which begins with `what`, unless this base is accepted."""
        if not self.accepts(base, kin):
            raise BaseMismatch(
                f"{what} the base {base[:12]}…, this site holds {self.fingerprint.digest[:12]}…; {self._remedy(kin)}"
            )

    def _remedy(self, kin: str) -> str:
        if not kin:
            return "copy the same model directory to both; if one was packed from the other, run with mixed-bases=true"
        if not self.kin:
            return (
                f"the run takes in bases that are kin, and this one is packed and says no origin that is trusted here; "
                f"copy {ORIGIN} of the centre's pack, which `umbel base pack --signing-key` signs"
            )
        return "copy the same model directory to both, or a base that was packed from it"


def _trusted_kin(model: Path, packed: BaseFingerprint, keys: SiteKeys) -> str:
    """Return the kin that a packed base says in its `origin.json`; empty where that is missing or not trusted."""
    try:
        origin = BaseOrigin.read(model, packed)
        if origin is None:
            return ""
        keys.require(origin, origin.signature)
    except (AdapterError, BaseMismatch, ConfigError) as error:
        logger.warning(
            "base.unsigned %s: %s. In runs with mixed-bases this base is kin to none: pack it at the centre with "
            "`umbel base pack --signing-key`, or copy %s of the centre's pack here",
            model, error, ORIGIN,
        )  # fmt: skip
        return ""
    return origin.kin
