"""`Users`: the demo's users at one site, one request after another through the official OpenAI client."""

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

MAX_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """One streamed answer: the version that gave it, seconds to its first token and per further token."""

    version: str
    training: bool
    ttft_s: float
    tpot_s: float


@dataclass
class Users:
    """Ask a site's adapter by its name, again and again. Every failure counts: the client retries nothing."""

    url: str
    model: str
    prompts: list[str]
    is_training: Callable[[], bool]
    seed: int
    think_s: tuple[float, float] = (0.2, 1.0)
    """Fewest and most seconds between an answer and the next question."""
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    asked_once: int = 0
    """Answers to `ask_once`, whose times are not measured."""

    def __post_init__(self) -> None:
        self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_asking, daemon=True)

    def start(self) -> None:
        """Begin to ask, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the open request end, and send no other one."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(70)

    def ask_once(self, model: str, question: str) -> tuple[str, str]:
        """Ask one question greedily, in the caller's thread; return the answer, and the version that gave it.

        A failure counts among the users'; its answer is empty, and its version is `nobody`.
        """
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=MAX_TOKENS, temperature=0.0
            )
            text = raw.parse().choices[0].message.content or ""
        except Exception as error:  # whatever it is, a user was not answered
            self.failures.append(f"{type(error).__name__}: {error}")
            return "", "nobody"
        self.asked_once += 1
        return text.strip(), raw.headers["x-umbel-adapter"]

    def summary(self) -> dict[str, Any]:
        """Return requests, failures, versions, and latencies with and without training at the site."""
        return {
            "requests": len(self.answers) + self.asked_once + len(self.failures),
            "failed": len(self.failures),
            "failures": self.failures[:10],
            "answers_by_version": dict(Counter(answer.version for answer in self.answers)),
            "with_training": _latency([answer for answer in self.answers if answer.training]),
            "without_training": _latency([answer for answer in self.answers if not answer.training]),
        }

    def _keep_asking(self) -> None:
        dice = random.Random(self.seed)
        while not self._stop.is_set():
            training = self.is_training()
            try:
                self.answers.append(self._ask(dice.choice(self.prompts), training))
            except Exception as error:  # whatever it is, a user was not answered
                self.failures.append(f"{type(error).__name__}: {error}")
            self._stop.wait(dice.uniform(*self.think_s))

    def _ask(self, prompt: str, training: bool) -> Answer:
        began = time.perf_counter()
        raw = self._client.chat.completions.with_raw_response.create(
            model=self.model, messages=[{"role": "user", "content": prompt}], max_tokens=MAX_TOKENS, stream=True
        )
        times, finished = [], False
        for chunk in raw.parse():
            choice = chunk.choices[0] if chunk.choices else None
            if choice is not None and choice.delta.content:
                times.append(time.perf_counter())
            finished = finished or (choice is not None and choice.finish_reason is not None)
        if not finished:
            raise RuntimeError("the stream ended before its answer did")
        first = times[0] if times else time.perf_counter()
        tpot = (times[-1] - first) / (len(times) - 1) if len(times) > 1 else 0.0
        return Answer(raw.headers["x-umbel-adapter"], training, first - began, tpot)


def _latency(answers: list[Answer]) -> dict[str, float]:
    """Return the number of answers, and medians and 95th percentiles in milliseconds where there are two or more."""
    found: dict[str, float] = {"answers": len(answers)}
    tpots = [answer.tpot_s for answer in answers if answer.tpot_s]
    for name, seconds in (("ttft_ms", [answer.ttft_s for answer in answers]), ("tpot_ms", tpots)):
        if len(seconds) > 1:
            found[f"{name}_p50"] = round(1000 * statistics.median(seconds), 1)
            found[f"{name}_p95"] = round(1000 * statistics.quantiles(seconds, n=20)[-1], 1)
    return found
