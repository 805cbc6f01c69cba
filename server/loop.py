"""`run`: the rounds of a federation, or of a site alone: train, publish, judge, promote or discard."""

import time
from collections.abc import Callable, Mapping

from server.federation import Federation
from server.registry.round_log import RoundState

PAUSE_S = 5.0
"""Seconds before the next round after one that ended for nothing; twice as long after each further one."""
LONGEST_PAUSE_S = {RoundState.IDLE: 60.0}
"""How a round ended → the longest such pause after it; none after others."""


def run(federation: Federation, sleep: Callable[[float], None] = time.sleep) -> None:
    """Run all rounds; every round ends for a recorded reason."""
    pause_s = 0.0
    for number in federation.rounds():
        if pause_s:
            sleep(pause_s)
        run_round(federation, number)
        pause_s = longer(pause_s, federation.state_of(number), LONGEST_PAUSE_S)


def longer(pause_s: float, ended: RoundState | None, longest: Mapping[RoundState, float]) -> float:
    """Return the seconds to wait after a round that `ended` so, where it was `pause_s` before it."""
    most = longest.get(ended, 0.0) if ended is not None else 0.0
    return min(max(PAUSE_S, 2 * pause_s), most)


def run_round(federation: Federation, number: int) -> None:
    """Train, publish, shadow, and let a quorum of sites decide."""
    version = federation.version_of(number) or federation.train(number)
    if version is None:
        return
    judgement = federation.judge(number, version)
    if judgement.accepted:
        federation.promote(number, version, judgement)
    else:
        federation.discard(number, version, judgement)
