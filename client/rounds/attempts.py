"""`Attempts`: count the attempts at a round of which an engine or the daemon died, and say when to give up."""

from client.rounds.journal import RoundJournal
from umbel.messages import JobState

MAX_ATTEMPTS = 5
"""Attempts at a round that count; an engine that dies in all of them probably dies of the round."""
MAX_EXCUSED = 20
"""Attempts that do not count, because users may have ended the engine, or the round got further. Bounded for the users'
sake: a round that itself ends each engine may look the same."""


class Attempts:
    """The attempts at one round, in the journal; so is the step from which the last one started, in its report."""

    def __init__(self, rounds: RoundJournal, key: str) -> None:
        self._rounds, self._key = rounds, key

    def begin(self, step: int) -> int:
        """Begin one from this step of the checkpoint; return its number among those that count."""
        if step > self._rounds.get(self._key)[1].steps:
            self._rounds.excuse_attempt(self._key, MAX_EXCUSED)  # that of a daemon which has died
        self._note(step)
        return self._rounds.begin_attempt(self._key)

    def cut_off(self, step: int, under_users: bool) -> bool:
        """End one that has come to this step; return whether it counts."""
        further = step > self._rounds.get(self._key)[1].steps
        self._note(step)
        return not ((under_users or further) and self._rounds.excuse_attempt(self._key, MAX_EXCUSED))

    @property
    def begun(self) -> int:
        """Return the number of all, those that do not count included."""
        return self._rounds.begun(self._key)

    def _note(self, step: int) -> None:
        report = self._rounds.get(self._key)[1]
        if not report.state.final:  # it may have been cancelled meanwhile
            self._rounds.report(report.model_copy(update={"state": JobState.RUNNING, "steps": step}))
