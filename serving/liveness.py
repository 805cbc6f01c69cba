"""`Liveness`: decides whether an engine that runs does nothing any more; `watch` looks at one until it hangs.

A check that waits for its token is no hang: a long prompt, a full batch or a slow device keeps it waiting. What counts
is progress. The HTTP server has to answer; and tokens have to come out, or at least batches have to be computed.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx

from serving.engine import EngineClient
from serving.engine_state import EngineState
from serving.priorities import Priority
from umbel.errors import EngineError

LOOK_EVERY_S = 5.0
"""Longest time between two looks at an engine; a sixth of the allowed silence where that is shorter."""
COMPUTING = 10
"""An engine that computes, and of which no token comes out, may do so this many times as long as one that does not."""
CHECK = {"text": "hello", "sampling_params": {"max_new_tokens": 1}, "priority": Priority.CHECK}
"""Body of the request for one token of the base."""


@dataclass(frozen=True)
class Look:
    """What one look at an engine found."""

    http: bool
    """True if its HTTP server answered."""
    token: bool = False
    """True if a check was answered since the last look."""
    outputs: int = 0
    """Outputs that reached its HTTP process so far (`EngineState.outputs`)."""
    batches: int = 0
    """Batches that its scheduler began so far (`EngineState.batches`)."""
    loading: bool = False
    """True while it loads a version."""


class Liveness:
    """Judges one run of an engine by looks at it. Times are seconds on any clock.

    A look accounts for at most `longest_s`: the time in which nobody looked, as when the daemon itself was stopped, is
    no silence of the engine's. A load of a version may take `timeout_s` on top.
    """

    def __init__(self, timeout_s: float, longest_s: float, now: float) -> None:
        self._timeout_s, self._longest_s = timeout_s, longest_s
        self._looked = now
        self._outputs = self._batches = 0
        self._unanswered_s = self._without_token_s = self._without_batch_s = self._loading_s = 0.0

    def hangs(self, look: Look, now: float) -> str:
        """Take a look into account; return why the engine hangs, or nothing if it does not."""
        passed, self._looked = min(max(now - self._looked, 0.0), self._longest_s), now
        came_out = look.token or look.outputs != self._outputs
        computed = came_out or look.batches != self._batches
        self._outputs, self._batches = look.outputs, look.batches
        self._unanswered_s = 0.0 if look.http else self._unanswered_s + passed
        self._without_token_s = 0.0 if came_out else self._without_token_s + passed
        self._loading_s = 0.0 if computed else self._loading_s + passed * look.loading
        self._without_batch_s = 0.0 if computed else self._without_batch_s + passed
        if self._unanswered_s > self._timeout_s:
            return f"its HTTP server has not answered for {self._unanswered_s:.0f} s"
        if self._without_batch_s - min(self._loading_s, self._timeout_s) > self._timeout_s:
            return f"it has computed nothing for {self._without_batch_s:.0f} s, though asked for a token"
        if self._without_token_s > COMPUTING * self._timeout_s:
            return f"it computes, and no token has come out for {self._without_token_s:.0f} s"
        return ""


async def watch(client: EngineClient, state: EngineState, timeout_s: float) -> str:
    """Look at a running engine until it hangs; return why. It asks for a token only while none comes out for users."""
    every = min(LOOK_EVERY_S, timeout_s / 6)
    loop = asyncio.get_running_loop()
    liveness = Liveness(timeout_s, longest_s=3 * every, now=loop.time())
    outputs = -1
    check: asyncio.Task[bool] | None = None
    try:
        while True:
            await asyncio.sleep(every)
            token = False
            if check is not None and check.done():
                token, check = check.result(), None
            look = Look(
                http=await _answers(client, "GET", "/umbel/inflight", every),
                token=token,
                outputs=state.outputs,
                batches=state.batches,
                loading=client.loading > 0,
            )
            if why := liveness.hangs(look, loop.time()):
                return why
            if check is None and look.outputs == outputs:
                check = asyncio.create_task(_answers(client, "POST", "/generate", timeout_s / 2, json=CHECK))
            outputs = look.outputs
    finally:
        if check is not None:
            check.cancel()


async def _answers(client: EngineClient, method: str, path: str, seconds: float, **content: Any) -> bool:
    try:
        async with asyncio.timeout(seconds):  # also for an answer that comes byte by byte
            return (await client.ask(method, path, seconds, **content)).status_code == 200
    except (TimeoutError, EngineError, httpx.HTTPError):
        return False
