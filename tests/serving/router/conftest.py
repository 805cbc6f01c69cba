"""The router's tests share a router around an application that answers every route."""

from pathlib import Path

import pytest

from serving.router.router import Router
from tests.toys.serving.router import KEY, TABLE, VOCAB, Inner


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    TABLE.write(tmp_path / "aliases.json")
    return tmp_path / "aliases.json"


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def router(inner: Inner, table_file: Path) -> Router:
    return Router(inner, table_file, KEY, VOCAB)
