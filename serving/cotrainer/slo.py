"""`Slo`: latency targets of a site, their defaults and margins, and the lengths of quanta that follow from them.

Pure; all times are seconds. S_ttft and S_tpot are `Slo.first_token_s` and `Slo.tpot_s`.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from serving.cotrainer.predictor import Batch, Predictor, prefill_batch
from umbel.site.sections import SloSection

TTFT_FACTOR, TPOT_FACTOR = 3.0, 2.0
"""Default targets are so many times what the engine needs by itself."""
LONG_PROMPT = 4096
"""Tokens of a prompt at which the default target is `TTFT_FACTOR` times its prefill.

The target is linear in the tokens and attention is not: below, the target is looser, above it is tighter, but even for
a prefill that is all attention no tighter than the prefill itself up to `TTFT_FACTOR` times these tokens.
"""
ONE_STREAM = Batch("decode", 1, cached_tokens=128)
"""Decode iteration from which default targets follow: that of a user who is alone.

Batches grow with the load, and training itself makes them larger; targets that grew with them would allow more of it.
"""
IDLE_PART = 0.1
"""Share of the shortest S_ttft that a quantum of an idle engine may take."""
MARGIN = (0.02, 0.9)
"""Smallest and largest margin."""
MARGIN_START = 0.3
"""Margin at the start: a large one, because learning a margin from late requests costs late requests."""
MARGIN_STEP = 0.1
"""Added to a margin by each request that training made late; the steps back balance it at the allowed share."""
BURST_S = 10.0
"""Requests that are late within so many seconds have one cause, and widen a margin by one step at most."""


@dataclass(frozen=True)
class Slo:
    """Targets: a share `quantile` of requests within `first_token_s` to the first token and `tpot_s` per later one."""

    ttft_s: float
    """Seconds to the first token, whatever the prompt."""
    tpot_s: float
    """Mean over the later tokens of a request."""
    quantile: float
    batch_factor: float
    """Requests of the batch class may take this many times as long."""
    ttft_per_token_s: float = 0.0
    """Seconds more per prompt token to compute; 0 where the site gave one number."""

    @classmethod
    def usual(cls, ttft_s: float, tpot_s: float) -> Self:
        """Return targets with the `quantile` and `batch_factor` that a site file has by default."""
        usual = SloSection()
        return cls(ttft_s, tpot_s, usual.quantile, usual.batch_factor)

    def first_token_s(self, prompt_tokens: int) -> float:
        """Return the target to the first token of a request of which so many prompt tokens had to be computed."""
        return self.ttft_s + self.ttft_per_token_s * prompt_tokens

    def factor(self, interactive: bool) -> float:
        """Return the number that both targets are multiplied with for a request of this class."""
        return 1.0 if interactive else self.batch_factor


class Margin:
    """The part of a target that is kept back: an integral controller on the requests beside which training ran.

    Each moves it by MARGIN_STEP · (late − allowed): adaptive conformal inference (Gibbs and Candès 2021, arXiv
    2106.00170), by which the share of late ones tends to `allowed` whatever the load does, as long as the margin is
    not at its largest. The movements of a burst are summed before they are cut to one step, so that a high rate of
    requests in time does not outweigh late ones that were not counted.
    """

    def __init__(self) -> None:
        self.value = MARGIN_START
        self._burst_began = -math.inf
        """Time of the late request that began the last burst."""
        self._before = MARGIN_START
        """Value before that burst."""
        self._sum = 0.0
        """Movements within that burst."""

    def move(self, late: bool, allowed: float, now: float) -> None:
        """Count a request beside which something was trained; `late` says whether that made it miss its target.

        `now` is in seconds on any clock that does not jump.
        """
        smallest, largest = MARGIN
        if not now - self._burst_began < BURST_S:
            self._before, self._sum = self.value, 0.0
            self._burst_began = now if late else -math.inf
        self._sum = max(self._sum + MARGIN_STEP * (late - allowed), smallest - self._before)
        self.value = min(max(self._before + min(self._sum, MARGIN_STEP), smallest), largest)

    def start_again(self) -> None:
        """Widen a narrow margin to its start; a wider one stays."""
        self.value = max(self.value, MARGIN_START)
        self._burst_began = -math.inf


def quantum_target(slo: Slo, predictor: Predictor) -> float:
    """Return Q*, the P99 in seconds that quanta should not exceed while users are served.

    It is half of the time that a decode iteration leaves of S_tpot.
    """
    return max(0.5 * (slo.tpot_s - predictor.typical("decode")), 0.05 * slo.tpot_s)


def idle_quantum_target(slo: Slo, busy: float) -> float:
    """Return Q* while nobody is served, `busy` being Q* while users are.

    It may be longer: a quantum of an idle engine can delay only the first token of the next request.
    """
    return max(busy, IDLE_PART * slo.ttft_s)


def default_slo(predictor: Predictor) -> Slo | None:
    """Return targets for a site that set none: twice a decode iteration, three times prefill plus decode.

    Both are those of a user who is alone, and the prefill that of a prompt's own length. None until `predictor` knows
    them.
    """
    if not predictor.ready:
        return None
    decode = predictor.expected(ONE_STREAM)
    shortest, long = (predictor.expected(prefill_batch([(tokens, 0)])) for tokens in (0, LONG_PROMPT))
    return replace(
        Slo.usual(TTFT_FACTOR * (shortest + decode), TPOT_FACTOR * decode),
        ttft_per_token_s=TTFT_FACTOR * (long - shortest) / LONG_PROMPT,
    )
