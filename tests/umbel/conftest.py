"""Tests of the shared vocabulary run without the settings of this shell."""

import os

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("UMBEL_SITE__"):
            monkeypatch.delenv(name)
