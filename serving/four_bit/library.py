"""`bitsandbytes`: the library, imported so that no network is asked for anything; `absent` hides a package."""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from umbel.base.packed import METHOD, MISSING
from umbel.errors import ConfigError


def bitsandbytes() -> ModuleType:
    """Return the library; raise ConfigError where it is not installed.

    Where the CPU has AVX512-BF16, its import asks the Hugging Face Hub for a native kernel through the package
    `kernels`, which nothing of umbel needs.
    """
    if METHOD in sys.modules:
        return sys.modules[METHOD]
    logger = logging.getLogger(METHOD)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that it has no such kernel
    try:
        with absent("kernels"):
            return importlib.import_module(METHOD)
    except ModuleNotFoundError as error:
        if error.name != METHOD:
            raise
        raise ConfigError(MISSING) from error
    finally:
        logger.setLevel(level)


@contextmanager
def absent(package: str) -> Iterator[None]:
    """Let no import find a package, as if it were not installed."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    for name in hidden:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to say that it cannot be imported
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(hidden)
