"""Tiny bases of every family in 4 bits.

Flower's environment reads this file, too, although it runs no test of this folder: what it lacks is imported late.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session", params=["llama", "mistral", "qwen2", "qwen3"])
def pair(
    request: pytest.FixtureRequest, tiny_base: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A dense base, and the packed one that was made of it."""
    from serving.four_bit.pack import pack

    folder = tmp_path_factory.mktemp("pair")
    dense = tiny_base.build(folder / request.param, replace(tiny_base.TINY, family=request.param, inner=192))
    pack(dense, folder / f"{request.param}-nf4", tell=lambda line: None)
    return dense, folder / f"{request.param}-nf4"


@pytest.fixture
def packed(pair: tuple[Path, Path]) -> Path:
    return pair[1]
