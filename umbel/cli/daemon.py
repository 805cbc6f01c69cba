"""`ask`: call a site's daemon on the operator's socket; `OwnDaemon`: one that a command starts and ends."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from umbel import secret_file
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig
from umbel.site.daemon_lock import daemon_runs

ANSWER_S = 60
"""Seconds that the daemon may take for an answer."""
LOOK_S = 0.5
"""Seconds between two looks at a daemon that starts."""
TELL_S = 30.0
"""Seconds after which it is said again that the engine is not ready."""
LOG = "serve.log"
"""Name of the log in state_dir of a daemon that a command starts; it begins anew with each."""
END_S = 30.0
"""Seconds that a daemon may take to end, besides those that open requests get."""


class NoDaemon(ConfigError):
    """No daemon listens on the operator's socket."""


def ask(config: SiteConfig, method: str, path: str, seconds: float = ANSWER_S) -> dict[str, Any]:
    """Call the site's control API; raise ConfigError with the daemon's reason, or where no daemon answers."""
    import httpx

    socket = config.operator_socket
    try:
        with httpx.Client(transport=httpx.HTTPTransport(verify=False, uds=str(socket)), timeout=seconds) as client:
            reply = client.request(method, f"http://site{path}")
    except httpx.TimeoutException as error:  # it listens; a roll-back that is asked for twice would be taken back
        raise ConfigError(
            f"{socket}: the daemon did not answer within {seconds:g} s, and may still do it; see `umbel status` "
            "before you ask again"
        ) from error
    except httpx.TransportError as error:
        raise NoDaemon(f"{socket}: nobody answers ({error}); is `umbel serve` running?") from error
    body: dict[str, Any] = reply.json()
    if reply.status_code != 200:
        raise ConfigError(body["error"]["message"])
    return body


class OwnDaemon:
    """`umbel serve` as a child of this process, as a context manager; a daemon that runs already is left alone.

    However this process dies, the kernel tells the child to end.
    """

    def __init__(self, config: SiteConfig, site_file: Path, tell: Callable[[str], None]) -> None:
        self._config = config
        self._command = [sys.executable, "-P", "-m", "umbel.cli", "serve", str(site_file)]
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self._log = config.site.state_dir.resolve() / LOG

    def __enter__(self) -> Self:
        if daemon_runs(self._config.site.state_dir):
            self._tell(f"{self._config.site.name}: its daemon runs already, and goes on running afterwards")
        else:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(self._config.engine.drain_s + END_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # Ctrl-C once more: do not wait for open requests
            self._process.kill()
            self._process.wait()

    def require_alive(self) -> None:
        """Raise ConfigError, with its own last words, if the daemon that was started here has ended."""
        if self._process is not None and (status := self._process.poll()) is not None:
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            said = [line.removeprefix("umbel: ") for line in lines if line.startswith("umbel: ")] or lines[-1:]
            raise ConfigError(
                "\n".join([*said, f"so `umbel serve` ended with status {status}; its log is {self._log}"])
            )

    def wait_ready(self) -> dict[str, Any]:
        """Wait until the site's engine answers; return the site's status. Raises ConfigError if the daemon ends."""
        began = told = time.monotonic()
        while True:
            self.require_alive()
            try:
                status = ask(self._config, "GET", "/status")
                if status["engine"]["ready"]:
                    return status
            except NoDaemon:
                if self._process is None and not daemon_runs(self._config.site.state_dir):
                    self._start()  # the one that ran was about to end
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                self._tell(f"the engine is not ready after {told - began:.0f} s; a large base takes minutes to load")
            time.sleep(LOOK_S)

    def _start(self) -> None:
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._log, "wb", opener=secret_file.opener) as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which ends the daemon in its turn
                preexec_fn=_end_with_parent(os.getpid()),
            )  # fmt: skip
        self._tell(f"{self._config.site.name}: `umbel serve` starts and loads the base; its log is {self._log}")


def _end_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child does before it becomes another program: ask Linux for SIGTERM when its parent dies."""
    from serving.launch import PR_SET_PDEATHSIG

    library = ctypes.CDLL(None, use_errno=True)

    def ask_for_it() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before prctl took effect, and the kernel would never tell
            os._exit(1)

    return ask_for_it
