"""`DutyCycle`: a hard partition of one core: two processes by turns, each for a fixed share of the time.

Whoever has its turn has the core for itself; whoever has not stands still, even if the core is idle. So neither yields
to the other nor borrows from it, as with the percentages of NVIDIA's MPS.
"""

import contextlib
import os
import signal
import threading
import time
from types import TracebackType

PERIOD_S = 10e-3
"""Both have their turn within it: short beside an iteration, so that it is slowed down and not held up."""


class DutyCycle:
    """Stops and continues a server's process and a trainer's by turns, from a thread, until the context is left.

    >>> with DutyCycle(server=1234, trainer=1235, share=0.3):
    ...     await measure()
    """

    def __init__(self, server: int, trainer: int, share: float, period_s: float = PERIOD_S) -> None:
        self._server, self._trainer = server, trainer
        self._turns = (share * period_s, (1 - share) * period_s)
        """Seconds of the trainer and of the server."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the turns; both processes run again."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        until = time.perf_counter()
        try:
            while not self._over.is_set():
                for seconds, stops, goes_on in (
                    (self._turns[0], self._server, self._trainer),
                    (self._turns[1], self._trainer, self._server),
                ):
                    _send(stops, signal.SIGSTOP)
                    _send(goes_on, signal.SIGCONT)
                    until = max(until + seconds, time.perf_counter())  # a turn that came late is shorter for it
                    time.sleep(max(0.0, until - time.perf_counter()))
        finally:
            for process in (self._server, self._trainer):
                _send(process, signal.SIGCONT)


def _send(process: int, signal_: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and whoever waits for it will say so
        os.kill(process, signal_)
