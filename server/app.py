"""The ServerApp: runs the rounds of a federation, and goes on where it was interrupted."""

import ctypes

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.config import RunConfig
from server.exchange import Exchange
from server.federation import Federation
from server.loop import run
from server.registry import run_lock
from server.registry.events import EVENTS, Events, show_log
from server.registry.index import explained
from server.registry.registry import AdapterRegistry
from strategies import catalogue
from umbel.signing import read_private

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration asks for: Flower's entry point."""
    return_large_blocks()
    show_log()
    config = RunConfig.of(context.run_config)
    key = read_private(config.signing_key) if config.signing_key else None
    registry = AdapterRegistry(config.registry, create=True, key=key)
    with explained(registry.root), run_lock.exclusive(registry.root, config.adapter, config.grace_seconds):
        events, exchange = Events(config.registry / EVENTS), Exchange(grid, config.adapter)
        strategy = catalogue.find(config.strategy)(**config.options)
        run(Federation(config, registry, exchange, events, str(context.run_id), strategy))


M_MMAP_THRESHOLD = -3
"""Option of mallopt(3): blocks of at least this many bytes are mapped one by one."""
LARGE = 64 << 10
"""Bytes."""


def return_large_blocks() -> None:
    """Have glibc map every large block by itself; where there is no glibc, nothing changes.

    By default glibc raises the threshold to the largest block that was freed, and later blocks may stay in its arenas:
    the process then grows with the number of adapters that have passed through it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
