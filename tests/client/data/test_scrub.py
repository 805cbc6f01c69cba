"""Personal data is taken out by Presidio's patterns: without a model, and without a network."""

import socket
import sys
from typing import Any

import pytest

from client.data.scrub import load
from umbel.errors import ConfigError


def test_without_presidio_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"\[examples\].enabled needs spacy.*pip install -e '\.\[site,examples\]'"):
        load()


def test_what_identifies_a_person_is_replaced_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("presidio_analyzer", reason="needs umbel[examples]")

    def offline(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", offline)
    scrub = load()
    assert scrub("Write to eva.m@clinic-a.example.org or call +49 170 1234567, or (212) 555-0143.") == (
        "Write to <EMAIL_ADDRESS> or call <PHONE_NUMBER>, or <PHONE_NUMBER>."
    )
    assert scrub("card 4111 1111 1111 1111, IBAN DE89370400440532013000, ip 10.1.2.3, ssn 536-90-4399") == (
        "card <CREDIT_CARD>, IBAN <IBAN_CODE>, ip <IP_ADDRESS>, ssn <US_SSN>"
    )
    plain = "Ward 7, room 12 at 14:30: 250 mg twice a day."
    assert scrub(plain) == plain
