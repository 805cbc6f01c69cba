"""`load`: a scrubber that removes personal data from a text before it is kept, by Presidio's patterns, offline.

`pseudonym`: what stands for the name of a user who gave one.

E-mail and IP addresses, telephone, account and passport numbers and the like are found. Names in running text are not,
because that would need a language model: the operator looks for names while an example is in quarantine.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Protocol

from umbel.errors import ConfigError

LANGUAGE = "en"
KEY = "examples.key"
"""Name of the file in the state directory with the key of pseudonyms."""


class Scrubber(Protocol):
    """Replaces personal data in a text by its kind, such as `<EMAIL_ADDRESS>`."""

    def __call__(self, text: str) -> str: ...


def load() -> Scrubber:
    """Build the scrubber; raise ConfigError, with the command that installs it, where Presidio is missing."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry, predefined_recognizers
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_anonymizer import AnonymizerEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"[examples].enabled needs {error.name}, which takes personal data out; in umbel's repository: "
            "pip install -e '.[site,examples]' -c constraints/engine.txt"
        ) from error

    class Email(predefined_recognizers.EmailRecognizer):  # type: ignore[misc]
        def validate_result(self, pattern_text: str) -> bool | None:
            return True  # Presidio's own check would download the list of top-level domains

    names = ("CreditCard", "Crypto", "Iban", "Ip", "Phone", "UsSsn", "UsPassport", "UkNhs", "MacAddress")
    kinds = [getattr(predefined_recognizers, f"{name}Recognizer", None) for name in names]
    recognizers = [Email(), *(kind() for kind in kinds if kind is not None)]
    nlp = SpacyNlpEngine()
    nlp.nlp = {LANGUAGE: spacy.blank(LANGUAGE)}  # tokens only: no model, no download
    registry = RecognizerRegistry(recognizers=recognizers, supported_languages=[LANGUAGE])
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=[LANGUAGE])
    anonymizer = AnonymizerEngine()

    def scrub(text: str) -> str:
        found = analyzer.analyze(text, language=LANGUAGE, score_threshold=0.3)
        return str(anonymizer.anonymize(text, found).text)

    return scrub


def pseudonym(state_dir: Path, user: str) -> str:
    """Return the pseudonym of a user: always the same, and not traceable without the site's key (HMAC-SHA256)."""
    return hmac.new(key_of(state_dir), user.encode(), hashlib.sha256).hexdigest()


def key_of(state_dir: Path) -> bytes:
    """Return the site's secret, which pseudonyms are made with, creating it on first use."""
    file = state_dir / KEY
    if not file.is_file():
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "wb") as opened:
            opened.write(secrets.token_bytes(32))
    return file.read_bytes()
