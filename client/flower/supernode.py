"""`run`: keep a SuperNode at work, for `umbel supernode site.toml --superlink HOST:PORT …`.

Flower's SuperNode has one message in hand at a time, and waits for the ClientApp's reply without a limit. If the
ClientApp is killed after it announced its reply and before it sent all of it (by the kernel's memory killer, for
example), the SuperNode stays online and never takes a message again: flwr 1.41 and 1.42, `_push_messages` of
`flwr/supernode/start_client_internal.py`. Such a SuperNode is ended and started again. Otherwise this process is only
the SuperNode's parent.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from umbel import ports
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig

PATIENCE_S = 90.0
"""Longer than the 60 s after which Flower itself gives up a silent ClientApp, and answers in its place."""
LOOK_S = 5.0
"""Seconds between two looks at the processes."""
END_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
HOST, PORT = "127.0.0.1", "9094"
"""Flower's defaults: where a SuperNode answers its ClientApps."""
DEFAULTS = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
"""Environment of the SuperNode where the operator's has no other value: seconds between two looks for a message that
waits for its ClientApp, 1 by Flower's default."""
NODE = "client.flower.node"
"""The module that runs `flower-supernode`."""
CLIENT_APP = b"flwr-clientapp"
TAKEN = b"Receiving: "
ANSWERED = (b"Sent successfully", b"Ignoring", b"Failed to", b"error reply")
"""Parts of the log lines of a SuperNode that has dealt with the message it had taken."""

logger = logging.getLogger(__name__)


class Watch:
    """Detects a SuperNode that waits for a dead ClientApp, from its log and its processes. Times in seconds.

    >>> watch = Watch()
    >>> watch.hear(b"INFO :      Receiving: query.collect message")
    >>> watch.is_stuck(client_app_runs=False, now=0.0), watch.is_stuck(client_app_runs=False, now=PATIENCE_S + 1)
    (False, True)
    """

    def __init__(self) -> None:
        self._in_hand = False
        self._alone_since: float | None = None

    def hear(self, line: bytes) -> None:
        """Take note of a line of the SuperNode's log."""
        if TAKEN in line:
            self._in_hand = True
        elif any(words in line for words in ANSWERED):
            self._in_hand = False

    def is_stuck(self, client_app_runs: bool, now: float) -> bool:
        """Return whether a message has been in hand without a running ClientApp for longer than PATIENCE_S."""
        if not self._in_hand or client_app_runs:
            self._alone_since = None
            return False
        self._alone_since = now if self._alone_since is None else self._alone_since
        return now - self._alone_since > PATIENCE_S


def command(config: SiteConfig, arguments: Sequence[str]) -> list[str]:
    """Return the command line of `flower-supernode`: the operator's arguments, and this site's socket.

    Raises ConfigError where the arguments name no SuperLink, hold --node-config, which is umbel's, or name a port that
    is taken, and where the program is not installed here.
    """
    given = _Arguments().read(arguments)
    if given.node_config is not None:
        raise ConfigError("--node-config is umbel's: it names the control socket of the site file; remove it here")
    _require_superlink(given.superlink)
    _require_port(given.host, given.port)
    if not given.insecure and given.root_certificates is None:
        logger.info(
            "supernode.tls superlink=%s its certificate must be of an authority that this system trusts; name the "
            "federation's own with --root-certificates FILE, or say --insecure if the SuperLink does", given.superlink,
        )  # fmt: skip
    program = Path(sys.executable).with_name("flower-supernode")
    if not program.exists():
        raise ConfigError(f"{program} does not exist; this command belongs to Flower's environment, umbel[server]")
    return [sys.executable, "-P", "-m", NODE, *arguments, "--node-config", f'socket="{config.socket}"']


class _Arguments(argparse.ArgumentParser):
    """Reads those of Flower's arguments that are checked here; all of them are left to Flower."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        for name in ("--superlink", "--node-config", "--root-certificates"):
            self.add_argument(name)
        self.add_argument("--insecure", action="store_true")
        self.add_argument("--host", default=HOST)
        self.add_argument("--port", default=PORT)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        return self.parse_known_args(arguments)[0]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"umbel supernode: {message}")


def _require_superlink(superlink: str | None) -> None:
    """Raise ConfigError unless a SuperLink is named: Flower would join whatever listens on port 8000 of this machine.

    It is HOST:PORT, or [ADDRESS]:PORT for IPv6.
    """
    if not superlink:
        raise ConfigError(
            "no SuperLink is named, and Flower would join whatever listens on port 8000 of this machine; add "
            "--superlink HOST:PORT, the Fleet API of the federation's centre"
        )
    if "/" in superlink or not re.fullmatch(r".+:[0-9]+", superlink):
        raise ConfigError(f"--superlink {superlink}: write HOST:PORT, without a URL's prefix, such as centre.org:8000")


def _require_port(host: str, port: str) -> None:
    """Raise ConfigError where the SuperNode cannot listen; a port that is no number is left to Flower's own words."""
    if port.isdecimal() and (why := ports.refusal(host, int(port))):
        raise ConfigError(
            f"{host}:{port}, where a SuperNode answers its ClientApps, cannot be listened on ({why}); a second "
            f"SuperNode on this machine needs a port of its own: add --port {int(port) + 1}, or any other that is free"
        )


async def run(command: Sequence[str]) -> int:
    """Run `command`, again whenever it is stuck, until it ends by itself or by SIGTERM or SIGINT; return its status."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    while True:
        node = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=DEFAULTS | os.environ
        )
        watch = Watch()
        listening = asyncio.create_task(_listen(node, watch))
        while node.returncode is None and not stop.is_set():
            if watch.is_stuck(await asyncio.to_thread(client_app_runs, os.getpgrp()), time.monotonic()):
                logger.warning("supernode.stuck its ClientApp died before it had replied; starting the SuperNode anew")
                break
            await _first(node.wait(), stop.wait(), seconds=LOOK_S)
        ended_by_itself = node.returncode is not None
        await _end(node)
        await listening
        if ended_by_itself or stop.is_set():
            return node.returncode or 0


def client_app_runs(group: int) -> bool:
    """Return whether a ClientApp runs in a process group. A SuperNode and its children stay in their parent's group."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # the process ended meanwhile
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                found = CLIENT_APP in (entry / "cmdline").read_bytes()
                if found:
                    return True
    return False


async def _listen(node: asyncio.subprocess.Process, watch: Watch) -> None:
    """Copy the SuperNode's log to stdout line by line, and show each line to `watch`."""
    assert node.stdout is not None
    while line := await node.stdout.readline():
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        watch.hear(line)


async def _first(*events: object, seconds: float) -> None:
    tasks = [asyncio.ensure_future(event) for event in events]  # type: ignore[call-overload]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _end(node: asyncio.subprocess.Process) -> None:
    """End the SuperNode by SIGTERM, and by SIGKILL after END_S. Its children end by themselves without their parent."""
    if node.returncode is not None:
        return
    node.terminate()
    try:
        await asyncio.wait_for(node.wait(), END_S)
    except TimeoutError:
        node.kill()
        await node.wait()
