"""The keys at a site: the centre's, which it trusts, and its own, with which it signs what it has trained."""

from umbel import signing
from umbel.adapter import AdapterManifest
from umbel.messages import RoundOrder, RoundReport, Submit, UpdateStatement
from umbel.site_sections import SiteSection


class SiteKeys:
    """`[site].trusted_key` and `[site].signing_key`, of which a site may have none. Raises ConfigError for no key."""

    def __init__(self, section: SiteSection) -> None:
        self._name = section.name
        self._trusted = signing.read_public(section.trusted_key) if section.trusted_key else None
        self._own = signing.read_private(section.signing_key) if section.signing_key else None

    def require(self, document: AdapterManifest | Submit, signature: str) -> None:
        """Raise AdapterError unless the trusted centre signed it; whoever trusts no key takes everything."""
        if self._trusted is not None:
            signing.verify(self._trusted, document, signature)

    def sign(self, order: RoundOrder, report: RoundReport) -> RoundReport:
        """A finished round's report, signed for the order it answers; as it is where there is no key or no update."""
        if self._own is None or report.update is None:
            return report
        statement = UpdateStatement.of(self._name, order, report)
        return report.model_copy(update={"signature": signing.sign(self._own, statement)})
