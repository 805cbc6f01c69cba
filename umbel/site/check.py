"""`check_files`: report all missing or unusable files of a site file at once, before an engine is started."""

from collections.abc import Callable, Iterator
from pathlib import Path

from umbel import secret_file, signing
from umbel.base import read_config
from umbel.errors import ConfigError, UmbelError
from umbel.site.config import SiteConfig

LONGEST_SOCKET_PATH = 100
"""Largest length in bytes; the kernel's limit is 107."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def check_files(config: SiteConfig) -> None:
    """Raise the only mistake itself, or a ConfigError with one line per mistake where there are several."""
    found = list(mistakes(config))
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError("\n".join(map(str, found)))


def mistakes(config: SiteConfig) -> Iterator[UmbelError]:
    """Yield every mistake in the files. The engine is not needed for it."""
    site, training = config.site, config.training
    yield from _raised(lambda: _require_model(config.model.path))
    if site.trusted_key is not None:
        key = site.trusted_key
        yield from _raised(lambda: signing.read_public(key))
    if site.signing_key is not None:
        own = site.signing_key
        yield from _raised(lambda: signing.read_private(own))
    if config.engine.api_keys is not None:
        keys = config.engine.api_keys
        yield from _raised(lambda: secret_file.read_keys(keys))
    files = {"[training].data": training.data, "[training].eval_data": training.eval_data}
    files |= {f"[[shadow.guard]] {guard.name}": guard.data for guard in config.shadow.guard}
    for key_, file in files.items():
        if file is not None and not file.is_file():
            yield ConfigError(f"{key_}: {file} does not exist; point it to a JSONL file")
    taken = next((path for path in (site.state_dir, *site.state_dir.parents) if path.exists()), None)
    if taken is not None and not taken.is_dir():
        yield ConfigError(f"[site].state_dir: {taken} is a file; name a folder, or one that can be made")
    yield from _raised(lambda: require_short(config.socket, site.state_dir / "trainer.sock"))


def require_short(*sockets: Path) -> None:
    """Raise ConfigError for a path that the kernel cannot bind a Unix socket to."""
    for path in sockets:
        if len(str(path).encode()) > LONGEST_SOCKET_PATH:
            raise ConfigError(f"{path}: longer than a Unix socket's path may be; choose a shorter [site].state_dir")


def _require_model(model: Path) -> None:
    read_config(model)
    lacks = [] if any(model.glob("*.safetensors")) else ["*.safetensors (the weights)"]
    if not any((model / name).is_file() for name in TOKENIZERS):
        lacks.append("tokenizer.json")
    if lacks:
        raise ConfigError(f"[model].path: {model} lacks {' and '.join(lacks)}; copy the whole model directory there")


def _raised(check: Callable[[], object]) -> Iterator[UmbelError]:
    """Run a check and yield the error that it raises, if any."""
    try:
        check()
    except UmbelError as error:
        yield error
