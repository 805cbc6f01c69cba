"""`serve`: run a site's daemon, `umbel serve site.toml`: all that lives longer than one Flower message.

The daemon prepares the data, keeps the engine running, works through training jobs, moves adapter versions through
their life, and answers the control API on two Unix sockets: one for the ClientApp, which may be open to a group, and
one for the operator, which only its own user can open.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from client import metrics
from client.control import group_api, operator_api
from client.data import user_examples
from client.site import Site
from serving import engine_log
from umbel.errors import Conflict
from umbel.site.check import require_sockets
from umbel.site.config import SiteConfig
from umbel.site.daemon_lock import LOCK

MAX_HEADER_BYTES = 1 << 20  # a manifest travels in a header, and lists every module

logger = logging.getLogger(__name__)


async def serve(config: SiteConfig) -> None:
    """Run a site until SIGTERM or SIGINT. Raises UmbelError when it cannot start, and leaves no process behind."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    with _only_daemon(config), _listen(config) as listeners:
        site = await _unless_stopped(Site.prepare(config), stop)
        if site is None:
            return
        endpoint = metrics.Endpoint(config.metrics, site.status) if config.metrics else None
        servers = [_server(group_api(site)), _server(operator_api(site))]
        tasks = [
            *(
                asyncio.create_task(server.serve(sockets=[listener]), name="control API")
                for server, listener in zip(servers, listeners, strict=True)
            ),
            asyncio.create_task(site.supervisor.run(), name="supervisor"),
            *(asyncio.create_task(tenant.jobs.run(), name=f"rounds of {tenant.name}") for tenant in site.tenants),
            *(asyncio.create_task(tenant.fresh.keep_up(), name=f"data of {tenant.name}") for tenant in site.tenants),
            asyncio.create_task(engine_log.keep_bounded(config.site.state_dir / engine_log.FILE), name="engine log"),
            *(
                [asyncio.create_task(user_examples.keep_retention(config), name="retention")]
                if config.examples.enabled
                else []
            ),
        ]
        site.resume()
        try:
            await asyncio.wait([asyncio.create_task(stop.wait()), *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # raises the error that ended it
        finally:
            if endpoint is not None:
                await endpoint.close()
            await _shut_down(site, servers, tasks)


async def _shut_down(site: Site, servers: list[uvicorn.Server], tasks: list[asyncio.Task[None]]) -> None:
    """Let the control API end its answers, cancel all other tasks, then drain and end the engine."""
    logger.info("site.stopping site=%s", site.config.site.name)
    site.stopping = True
    for server in servers:
        server.should_exit = True
    for task in tasks[len(servers) :]:
        task.cancel()
    await site.background.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    await site.supervisor.stop()
    site.journal.close()


async def _unless_stopped(work: Any, stop: asyncio.Event) -> Any:
    """Await `work` and return its result; return None when a signal comes first."""
    task, stopped = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        stopped.cancel()
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


def _server(api: FastAPI) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            api, log_config=None, access_log=False, lifespan="off", http="h11",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
    )  # fmt: skip


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise a signal again before the engine is drained


@contextlib.contextmanager
def _only_daemon(config: SiteConfig) -> Iterator[None]:
    """Make the state directory, readable by this user only, and hold its lock. Raises Conflict if it is in use."""
    os.umask(0o077)
    state_dir = config.site.state_dir
    state_dir.mkdir(parents=True, exist_ok=True)
    state_dir.chmod(0o700)
    require_sockets(config)
    with (state_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"{state_dir}: another `umbel serve` uses it; stop that one or choose another state_dir"
            ) from error
        yield


@contextlib.contextmanager
def _listen(config: SiteConfig) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open the sockets of the ClientApp and of the operator, for this user.

    Where `[site].socket` sets the place of the first one, it is for the group too: so a SuperNode can run as another
    user of the same group, and can do nothing else at the site.
    """
    shared = config.site.socket is not None
    with _bound(config.socket, shared) as group, _bound(config.operator_socket, shared=False) as operator:
        yield group, operator


@contextlib.contextmanager
def _bound(path: Path, shared: bool) -> Iterator[socket.socket]:
    """Open a Unix socket; `shared`: for the group, too."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o750 if shared else 0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o660 if shared else 0o600)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
