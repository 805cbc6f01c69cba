"""`Trace`: arrivals from a trace of requests, or from distributions fitted to one.

They are fixed before a run, so that every system gets the same ones.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from umbel.errors import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LARGEST_CV = 10.0
"""Largest coefficient of variation of gaps; beyond it nearly all requests of a run come at once."""
NO_TRACE = "no trace was given: lengths are drawn from log-normal distributions fitted to the Azure conversation trace"
FITTED = ((1020.0, 0.77), (129.0, 0.93))
"""Median and sigma of log-normal prompt and output lengths, from the published quantiles of the Azure 2023 trace."""


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds after the start of the run."""
    prompt: int
    """Tokens of the prompt."""
    output: int
    """Tokens of the answer."""
    interactive: bool = True
    cached: int = 0
    """Tokens of the prompt that the engine has in its cache."""


@dataclass(frozen=True)
class Scale:
    """Lengths are divided by `divisor`, then cut off at `prompt` and `output`: for machines slower than the trace's."""

    divisor: int = 1
    prompt: int = 1 << 20
    output: int = 1 << 20


CORE = Scale(16, prompt=256, output=32)
"""For a tiny model on one core."""


@dataclass(frozen=True)
class ArrivalProcess:
    """The times at which requests arrive: the trace's own, or with gamma-distributed gaps (Poisson where `cv` is 1)."""

    name: str = "trace"
    cv: float | None = None
    """Coefficient of variation of the gaps; None for the trace's own gaps."""

    @classmethod
    def parse(cls, text: str) -> "ArrivalProcess":
        """Read `trace`, `poisson` or `gamma:CV`, such as `gamma:4` for bursts. Raises ConfigError."""
        if text in ("trace", "poisson"):
            return cls(text, 1.0 if text == "poisson" else None)
        kind, _, number = text.partition(":")
        try:
            cv = float(number)
        except ValueError:
            cv = math.nan
        if kind != "gamma" or not 0 < cv <= LARGEST_CV:
            raise ConfigError(
                f"--load {text}: expected trace, poisson, or gamma:CV, such as gamma:4, with the coefficient of "
                f"variation of the gaps: above 0, at most {LARGEST_CV:g}"
            )
        return cls(f"gamma:{cv:g}", cv)

    def gaps(self, count: int, seed: int) -> npt.NDArray[np.float64]:
        """Draw `count` gaps, one on average; for a process with a `cv`."""
        assert self.cv is not None
        return np.random.default_rng(seed).gamma(self.cv**-2, self.cv**2, count)


AS_TRACED = ArrivalProcess()


class Trace:
    """Times and lengths from which workloads are drawn; `lengths` are (prompt, output) tokens, scaled."""

    def __init__(
        self, seconds: npt.NDArray[np.float64], prompts: Sequence[int], outputs: Sequence[int], scale: Scale = CORE
    ) -> None:
        self.seconds = seconds
        self.lengths = [
            (min(max(1, prompt // scale.divisor), scale.prompt), min(max(1, output // scale.divisor), scale.output))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    @classmethod
    def read(cls, path: Path | None, scale: Scale = CORE) -> "Trace":
        """Read a CSV in the format of the Azure LLM inference traces; None: use `fitted`. Raises ConfigError."""
        if path is None:
            return cls.fitted(scale)
        try:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
            prompts, outputs = ([int(row[column]) for row in rows] for column in COLUMNS[1:])
        except (OSError, KeyError, TypeError, ValueError) as error:
            wanted = ", ".join(COLUMNS)
            raise ConfigError(f"{path}: not a trace ({error!r}); expected a CSV with columns {wanted}") from error
        if len(rows) < 2 or times[-1] <= times[0]:
            raise ConfigError(f"{path}: a trace of {len(rows)} requests in no time is none")
        return cls(np.array(times) - times[0], prompts, outputs, scale)

    @classmethod
    def fitted(cls, scale: Scale = CORE, requests: int = 20_000) -> "Trace":
        """Draw Poisson arrivals and log-normal lengths, for want of a trace."""
        rng = np.random.default_rng(0)
        prompts, outputs = (rng.lognormal(math.log(median), sigma, requests).astype(int) for median, sigma in FITTED)
        return cls(np.cumsum(rng.exponential(1.0, requests)), prompts.tolist(), outputs.tolist(), scale)

    def around(self, rate: float, seconds: float, start: float = 0.0) -> Iterator[Arrival]:
        """Yield the trace at a mean of `rate` requests per second, from its fraction `start` on, round and round."""
        count = len(self.lengths)
        span = (self.seconds[-1] - self.seconds[0]) * count / (count - 1)  # a gap follows the last request as well
        squeeze = count / span / rate
        first = int(start * count) % count
        begin = self.seconds[first]
        for n in range(first, first + int(10 * rate * seconds) + count):
            at = float((self.seconds[n % count] + n // count * span - begin) * squeeze)
            if at >= seconds:
                return
            yield Arrival(at, *self.lengths[n % count])

    def replay(
        self, rate: float, seconds: float, start: float, process: ArrivalProcess = AS_TRACED
    ) -> tuple[Arrival, ...]:
        """Return `rate · seconds` consecutive requests from the trace's fraction `start` on, fitted into `seconds`.

        Another `process` than the trace's gives the same requests other gaps. Raises ConfigError if the trace is
        shorter.
        """
        count = max(1, round(rate * seconds))
        first = int(start * len(self.lengths)) % max(1, len(self.lengths) - count - 1)
        if first + count >= len(self.lengths):
            raise ConfigError(f"the trace has {len(self.lengths)} requests, fewer than the {count} of one run")
        own = np.diff(self.seconds[first : first + count + 1])
        times = np.cumsum([0.0, *(own if process.cv is None else process.gaps(count, seed=first))])
        times = times / max(times[-1], 1e-9) * seconds
        return tuple(Arrival(float(times[n]), *self.lengths[first + n]) for n in range(count))

    def square(self, low: float, high: float, seconds: float, period: float, seed: int) -> tuple[Arrival, ...]:
        """Draw a Poisson process at the rate `low` in the first half of each period and `high` in the second."""
        rng = np.random.default_rng(seed)
        times = np.sort(rng.uniform(0, seconds, rng.poisson(high * seconds)))
        kept = [float(at) for at in times if at % period >= period / 2 or rng.uniform() < low / high]
        return tuple(Arrival(at, *self.lengths[rng.integers(len(self.lengths))]) for at in kept)
