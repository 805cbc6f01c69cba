"""A SuperNode that is started anew when it would wait for ever: `umbel supernode site.toml -- --superlink HOST:PORT …`.

Flower's SuperNode has one message in hand at a time, and waits for the ClientApp's reply without a limit. One that is
killed between announcing its reply and sending all of it (the kernel's memory killer needs no more) leaves a SuperNode
that is online and takes no message ever again: flwr 1.41 and 1.42, `_push_messages` of
`flwr/supernode/start_client_internal.py`. Where nothing of the kind happens this is the SuperNode's parent, no more.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from umbel.config import SiteConfig
from umbel.errors import ConfigError

PATIENCE_S = 90.0
"""Flower itself gives a silent ClientApp up after 60 s, and answers in its place."""
LOOK_S = 5.0
END_S = 10.0
CLIENT_APP = b"flwr-clientapp"
TAKEN = b"Receiving: "
ANSWERED = (b"Sent successfully", b"Ignoring", b"Failed to", b"error reply")
"""What a SuperNode logs once the message that it had taken is off its hands."""

logger = logging.getLogger(__name__)


class Watch:
    """Whether a SuperNode waits for a ClientApp that is no more, from its log and its processes. Times in seconds."""

    def __init__(self) -> None:
        self._in_hand = False
        self._alone_since: float | None = None

    def hear(self, line: bytes) -> None:
        """A line of the SuperNode's log."""
        if TAKEN in line:
            self._in_hand = True
        elif any(words in line for words in ANSWERED):
            self._in_hand = False

    def is_stuck(self, client_app_runs: bool, now: float) -> bool:
        """Whether a message has been in hand, with no ClientApp at work on it, for longer than Flower would allow."""
        if not self._in_hand or client_app_runs:
            self._alone_since = None
            return False
        self._alone_since = now if self._alone_since is None else self._alone_since
        return now - self._alone_since > PATIENCE_S


def command(config: SiteConfig, arguments: Sequence[str]) -> list[str]:
    """`flower-supernode` with what the operator wrote, and the way to this site's daemon."""
    if "--node-config" in arguments:
        raise ConfigError("--node-config is umbel's: it names the control socket of the site file; remove it here")
    program = Path(sys.executable).with_name("flower-supernode")
    if not program.exists():
        raise ConfigError(f"{program} does not exist; this command belongs to Flower's environment, umbel[server]")
    return [str(program), *arguments, "--node-config", f'socket="{config.socket}"']


async def run(command: Sequence[str]) -> int:
    """Keep a SuperNode at work until it ends by itself or by SIGTERM or SIGINT; its exit status."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    while True:
        node = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
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
    """Whether a ClientApp runs in a process group: a SuperNode, and what it starts, stay in the one of its parent."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended while we looked
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                found = CLIENT_APP in (entry / "cmdline").read_bytes()
                if found:
                    return True
    return False


async def _listen(node: asyncio.subprocess.Process, watch: Watch) -> None:
    """Pass the log on, line by line."""
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
    """SIGTERM, patience, SIGKILL; what the SuperNode started ends with it, by its own watch over its parent."""
    if node.returncode is not None:
        return
    node.terminate()
    try:
        await asyncio.wait_for(node.wait(), END_S)
    except TimeoutError:
        node.kill()
        await node.wait()
