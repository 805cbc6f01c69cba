"""`UpdateStatement`, `HelloStatement`, `VerdictStatement`: the documents that a site signs (umbel/signing.py).

They are never sent: the signature travels in the message, and each end builds the document.
"""

from typing import Self

from umbel.adapter import AdapterManifest
from umbel.messages import Hello, Message, RoundOrder, RoundReport, ShadowReport


class UpdateStatement(Message):
    """A site's word for an update, and for the counts beside it; or that a round brought none, and why."""

    site: str
    order: RoundOrder
    """The order that was carried out: run, round, parent, base, plan and nonce."""
    report: RoundReport
    """The result: the update's digest and the counts, without the signature and the version that is live by then."""

    @classmethod
    def of(cls, site: str, order: RoundOrder, report: RoundReport) -> Self:
        """Build the statement; the report's signature and live version are left out."""
        return cls(site=site, order=order, report=report.model_copy(update={"signature": "", "live": None}))


class HelloStatement(Message):
    """A site's word for its name, and for what it says of itself."""

    nonce: str
    """Of the question that it answers, so that a hello of another time is none."""
    hello: Hello
    """Without the signature."""

    @classmethod
    def of(cls, nonce: str, hello: Hello) -> Self:
        """Build the statement; the hello's signature is left out."""
        return cls(nonce=nonce, hello=hello.model_copy(update={"signature": ""}))


class VerdictStatement(Message):
    """A site's word for what it found about a version."""

    site: str
    nonce: str
    """Of the question that it answers."""
    lineage: str
    """Id of the registry whose version it is."""
    digest: str
    """sha256 of the weights that the site judged."""
    report: ShadowReport
    """The version's name, the measurements and the verdict, without the signature."""

    @classmethod
    def of(cls, site: str, nonce: str, manifest: AdapterManifest, report: ShadowReport) -> Self:
        """Build the statement; the report's signature is left out."""
        plain = report.model_copy(update={"signature": ""})
        return cls(site=site, nonce=nonce, lineage=manifest.lineage, digest=manifest.digest, report=plain)
