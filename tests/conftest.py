"""Tiny bases for all tests: built once per run, seconds each, no network. Skipped where transformers is not installed."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


def _load_tiny_base() -> ModuleType:
    """`scripts/tiny_base.py` as a module; scripts are no package."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed, reason=f"a tiny base needs {needed}: run in the engine's environment")
    path = Path(__file__).parents[1] / "scripts" / "tiny_base.py"
    spec = importlib.util.spec_from_file_location("tiny_base", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_base"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_base() -> ModuleType:
    """The module `scripts/tiny_base.py`."""
    return _load_tiny_base()


def _build(module: ModuleType, family: str, into: Path) -> Path:
    path: Path = module.build(into / family, replace(module.TINY, family=family))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tiny_base: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in float32, untied embeddings, briefly trained so that greedy decoding meets no ties."""
    return _build(tiny_base, "llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_mistral(tiny_base: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Mistral."""
    return _build(tiny_base, "mistral", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_base: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Qwen2: biases on q, k, v; tied embeddings."""
    return _build(tiny_base, "qwen2", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_base: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Qwen3: norms on q and k, heads wider than hidden / heads; tied embeddings."""
    return _build(tiny_base, "qwen3", tmp_path_factory.mktemp("base"))
