"""`Mirror`: replays a share of the live version's requests on the shadow; users neither see that nor wait for it.

Two answers are compared by their leading words: the share of the longer one's words up to the first difference. Once
greedy decoding has taken another word, the rest of the text is another one, so a comparison beyond it says nothing.
The comparison is linear in the length; an edit distance would hold up the event loop that users' answers pass through.
Sampled answers (temperature above 0) differ anyway: their agreement is a lower bound.

Contents are in memory until they are compared. They are never logged, reported or written to disk.
"""

import asyncio
import json
import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serving.router import asgi
from serving.router.asgi import Scope
from serving.router.traffic import Answer
from serving.traffic_report import MirrorTraffic
from umbel.adapter import AdapterRef
from umbel.errors import EngineError

MIRRORED = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose answers can be compared."""
QUEUE = 32
"""Highest number of requests that wait to be replayed; more are dropped."""
MAX_REQUEST_BYTES = 1 << 20
"""Longer requests are not mirrored: each waits in memory for its turn."""
MAX_ANSWER_BYTES = 1 << 20
"""Longer answers (bytes as sent) are not mirrored."""
TIMEOUT_S = 120.0
"""Seconds that one replay may take: far more than an answer needs, and short enough not to delay an unload."""
DROPPED_FIELDS = ("stream_options", "rid", "best_of")
"""Fields of a request that its replay leaves out."""
REFUSALS = (
    "i'm sorry", "i am sorry", "i can't", "i cannot", "i can not", "i won't", "i will not", "i'm unable", "i am unable",
    "i'm not able", "i am not able", "as an ai",
)  # fmt: skip
"""Phrases at the beginning of a refusal. A few English ones serve to compare two versions, not to count refusals."""
BEGINNING = 60
"""Number of first characters in which a phrase of a refusal is looked for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mirrored:
    """A request that the live version answered, to be replayed on the shadow."""

    ref: AdapterRef
    """The shadow that replays it."""
    path: str
    scope: Scope
    request: Mapping[str, Any]
    chunks: list[bytes]
    """The live version's answer, as it was sent."""
    streamed: bool


Replay = Callable[[AdapterRef, Scope, str, dict[str, Any]], Awaitable[bytes | None]]
"""Returns a version's answer to a request, as JSON, or None if it fails; raises EngineError if the engine is busy."""


class Mirror:
    """Replays requests one after the other, and only while no user waits for a first token."""

    def __init__(self, replay: Replay, may_replay: Callable[[AdapterRef], bool]) -> None:
        self._replay, self._may_replay = replay, may_replay
        self._queue: deque[Mirrored] = deque()
        self._sums: dict[str, Counter[str]] = {}
        self._agreement: defaultdict[str, float] = defaultdict(float)
        self._work: asyncio.Task[None] | None = None

    def watch(self, answer: Answer, path: str, share: float) -> None:
        """Record this answer for a replay with probability `share`, if its route can be mirrored."""
        if share and path in MIRRORED and random.random() < share:  # noqa: S311 - nothing secret
            answer.keep(MAX_ANSWER_BYTES)

    def offer(self, answer: Answer, ref: AdapterRef | None, scope: Scope, request: Mapping[str, Any]) -> None:
        """Queue the request of an answer that has ended, if the answer was recorded, is whole, and there is room."""
        if answer.kept is None or ref is None or not answer.whole:
            return
        if len(self._queue) >= QUEUE or asgi.length(scope) > MAX_REQUEST_BYTES:
            self._add(ref, dropped=1)
            return
        self._queue.append(Mirrored(ref, scope["path"], scope, request, answer.kept, answer.streamed))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._replay_all(), name="mirror")

    def report(self) -> dict[str, MirrorTraffic]:
        """Return the sums of each shadow."""
        return {label: MirrorTraffic(**sums, agreement=self._agreement[label]) for label, sums in self._sums.items()}

    def forget_all_but(self, labels: set[str]) -> None:
        """Drop the sums of all versions but these."""
        self._sums = {label: sums for label, sums in self._sums.items() if label in labels}
        self._agreement = defaultdict(float, {label: self._agreement[label] for label in self._sums})

    def stop(self) -> None:
        """Drop what waits, and cancel the replay that runs."""
        self._queue.clear()
        if self._work is not None:
            self._work.cancel()

    async def _replay_all(self) -> None:
        while self._queue:
            mirrored = self._queue.popleft()
            if not self._may_replay(mirrored.ref):
                self._add(mirrored.ref, dropped=1)
                continue
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    answer = await self._replay(mirrored.ref, mirrored.scope, mirrored.path, _once_more(mirrored))
            except (TimeoutError, EngineError):
                self._add(mirrored.ref, dropped=1)  # the engine is busy, which is no fault of the version
                continue
            except Exception as error:  # only its type is logged: the message may hold contents
                logger.warning("mirror.failed ref=%s %s", mirrored.ref, type(error).__name__)
                answer = None
            if answer is None:
                self._add(mirrored.ref, failed=1)
            else:
                self._compare(mirrored.ref, *await asyncio.to_thread(_texts, mirrored, answer))

    def _compare(self, ref: AdapterRef, live: str | None, shadow: str | None) -> None:
        if live is None or shadow is None:
            return self._add(ref, failed=1)
        live_words, words = live.split(), shadow.split()
        self._agreement[str(ref)] += agreement(live_words, words)
        self._add(
            ref, compared=1, words=len(words), live_words=len(live_words), empty=not words,
            live_empty=not live_words, refusals=refuses(shadow), live_refusals=refuses(live),
        )  # fmt: skip
        return None

    def _add(self, ref: AdapterRef, **counts: int) -> None:
        self._sums.setdefault(str(ref), Counter()).update(counts)


def agreement(live: list[str], shadow: list[str]) -> float:
    """Return the share (0..1) of the longer answer's words before the first difference; 1 for two empty answers."""
    longest = max(len(live), len(shadow))
    if not longest:
        return 1.0
    pairs = zip(live, shadow, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(live), len(shadow))) / longest


def refuses(answer: str) -> bool:
    """Return whether an answer begins like a refusal."""
    beginning = answer.strip()[:BEGINNING].lower().replace("’", "'")
    return any(phrase in beginning for phrase in REFUSALS)


def _texts(mirrored: Mirrored, answer: bytes) -> tuple[str | None, str | None]:
    """Return the texts of the live version's answer and of the shadow's."""
    live = said_in_stream(mirrored.chunks) if mirrored.streamed else said(b"".join(mirrored.chunks))
    return live, said(answer)


def said(body: bytes) -> str | None:
    """Return the text of an answer in one piece, tool calls included; None if it is not an answer."""
    try:
        return _first_choice(json.loads(body))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def said_in_stream(chunks: Iterable[bytes]) -> str | None:
    """Return the text of a streamed answer; None if it is not an answer."""
    parts = []
    try:
        for line in b"".join(chunks).splitlines():
            payload = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and payload != b"[DONE]":
                event = json.loads(payload)
                parts.append(_first_choice(event) if event["choices"] else "")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return "".join(parts)


def _first_choice(answer: Mapping[str, Any]) -> str:
    """Return the text of the first choice of an answer or of an event."""
    choices = [choice for choice in answer["choices"] if not choice.get("index")]
    if not choices:
        return ""
    message = choices[0].get("message") or choices[0].get("delta") or {"content": choices[0].get("text")}
    calls = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    spoken = [message.get("reasoning_content"), message.get("content")]
    return "".join(filter(None, spoken + [call.get(part) for call in calls for part in ("name", "arguments")]))


def _once_more(mirrored: Mirrored) -> dict[str, Any]:
    """Return the request unchanged (temperature and max_tokens too), but for one answer, in one piece."""
    kept = {field: value for field, value in mirrored.request.items() if field not in DROPPED_FIELDS}
    return {**kept, "stream": False, "n": 1}
