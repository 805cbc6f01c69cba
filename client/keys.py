"""`SiteKeys`: the centre's public key, which the site trusts, and the private key with which the site signs."""

from pathlib import Path

from umbel import signing
from umbel.adapter import AdapterManifest
from umbel.base.origin import BaseOrigin
from umbel.messages import Hello, JobState, RoundOrder, RoundReport, ShadowReport, Submit
from umbel.site.sections import SiteSection
from umbel.statements import HelloStatement, UpdateStatement, VerdictStatement


class SiteKeys:
    """The key of a centre that the site trusts, and `[site].signing_key`; there may be one, both or none.

    The first is `trusted_key`, an adapter's, or by default `[site].trusted_key`. Raises ConfigError for a file that
    holds no key.

    >>> keys = SiteKeys(config.site, config.trusted_key("support"))
    >>> keys.require(manifest, signature)  # raises AdapterError unless the centre signed it
    """

    def __init__(self, section: SiteSection, trusted_key: Path | None = None) -> None:
        self._name = section.name
        trusted = trusted_key or section.trusted_key
        self._trusted = signing.read_public(trusted) if trusted else None
        self._own = signing.read_private(section.signing_key) if section.signing_key else None

    def require(self, document: AdapterManifest | Submit | BaseOrigin, signature: str) -> None:
        """Raise AdapterError unless the trusted centre signed the document. Without `trusted_key` all is accepted."""
        if self._trusted is not None:
            signing.verify(self._trusted, document, signature)

    def sign_update(self, order: RoundOrder, report: RoundReport) -> RoundReport:
        """Return a report signed for its order, if the round is done or skipped; unchanged without a key."""
        if self._own is None or report.state not in (JobState.DONE, JobState.SKIPPED):
            return report
        statement = UpdateStatement.of(self._name, order, report)
        return report.model_copy(update={"signature": signing.sign(self._own, statement)})

    def sign_hello(self, hello: Hello, nonce: str) -> Hello:
        """Return the hello, signed for the centre's question; unchanged without a key or a nonce."""
        if self._own is None or not nonce:
            return hello
        return hello.model_copy(update={"signature": signing.sign(self._own, HelloStatement.of(nonce, hello))})

    def sign_verdict(self, manifest: AdapterManifest, report: ShadowReport, nonce: str) -> ShadowReport:
        """Return a version's report, signed for the centre's question; unchanged without a key or a nonce."""
        if self._own is None or not nonce:
            return report
        statement = VerdictStatement.of(self._name, nonce, manifest, report)
        return report.model_copy(update={"signature": signing.sign(self._own, statement)})
