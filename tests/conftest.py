"""Fixtures for all tests (tiny bases, short folders for Unix sockets), and which environment runs which folder."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

# Eight processes of tests share two cores. What tests start has these variables, too; a file that sets none is served
# by test_readme_site.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine has it by itself
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's: its threads spin under any setting

SITE = ("client", "serving", "scripts", "interop", "hostile/site", "recovery/site", "e2e")
"""Folders whose tests need SGLang: they run in the engine's environment only."""
CENTRE = ("strategies", "server", "client/flower", "examples/centre", "hostile/centre", "recovery/centre", "e2e/centre")
"""Folders whose tests need Flower: they run in Flower's environment only. All other tests run in both."""


class OfTheOther(pytest.Module):
    """A test file of the other environment: nothing in it is imported here, also where it was asked for by name."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Leave a test out where its environment is another one: the longest folder of the two lists decides."""
    folder = module_path.parent.relative_to(Path(__file__).parent).as_posix() + "/"
    needs = max((one for one in (*SITE, *CENTRE) if folder.startswith(one + "/")), key=len, default=None)
    module = "flwr" if needs in CENTRE else "sglang"
    return OfTheOther.from_parent(parent, path=module_path) if needs and not importlib.util.find_spec(module) else None


LONGEST = (
    "test_kills.py", "test_rounds.py", "test_fleet.py", "test_served_tokens.py", "test_verdicts.py", "test_hangs.py",
)  # fmt: skip
"""End-to-end tests that wait for Flower or start several engines: begun first, so that no worker ends long after."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then all other end-to-end tests, then the rest as it was."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    last = len(LONGEST)
    items.sort(key=lambda item: rank.get(item.path.name, last + (item.get_closest_marker("e2e") is None)))


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's path has at most 107 bytes, and pytest's own folders are deep."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def tiny_base() -> ModuleType:
    """The module `scripts/tools/tiny_base.py`."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed, reason=f"a tiny base needs {needed}: run in the engine's environment")
    return importlib.import_module("scripts.tools.tiny_base")


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


@pytest.fixture(scope="session")
def packed_llama(tiny_base: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama, packed in 4 bits; its MLP is wider, because transformers computes wrong numbers in other widths."""
    from serving.four_bit.pack import pack

    recipe = replace(tiny_base.TINY, inner=192)
    dense: Path = tiny_base.build(tmp_path_factory.mktemp("dense") / "llama", recipe)
    packed = tmp_path_factory.mktemp("packed") / "llama-nf4"
    pack(dense, packed)
    return packed
