"""What several test files share: tiny bases, built once per run, and short places for Unix sockets."""

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

# Each environment runs what can be imported there; between the two every file is run.
NEEDS = {
    "sglang": ["test_serving_*.py", "test_client_comparison.py", "test_client_data.py", "test_client_deployer*.py",
               "test_client_jobs*.py", "test_client_keys.py", "test_client_metrics.py", "test_client_watch.py",
               "test_recovery_site.py", "test_scripts_*.py", "test_peft_*.py", "test_hostile_users.py",
               "test_hostile_control.py", "e2e/test_canary.py", "e2e/test_export_served.py", "e2e/test_fleet.py",
               "e2e/test_hostile.py", "e2e/test_kills.py", "e2e/test_rounds.py", "e2e/test_served_tokens.py",
               "e2e/test_site.py", "e2e/test_verdicts.py"],
    "flwr": ["test_server_*.py", "test_strategies_*.py", "test_client_app.py", "test_hostile_centre.py",
             "test_recovery_centre.py", "e2e/test_secure.py"],
}  # fmt: skip
collect_ignore_glob = [glob for needed in NEEDS if not importlib.util.find_spec(needed) for glob in NEEDS[needed]]


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's path has at most 107 bytes, and pytest's own folders are deep."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def tiny_base() -> ModuleType:
    """The module `scripts/tiny_base.py`."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed, reason=f"a tiny base needs {needed}: run in the engine's environment")
    return importlib.import_module("tiny_base")


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
