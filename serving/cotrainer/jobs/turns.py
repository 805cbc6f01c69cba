"""`Turns`: says which job has the trainer next. Pure: no torch, no clock; jobs are names, all times are seconds.

Evaluations go first, in the order in which they came, and nothing interrupts one. Training jobs share what is left by
start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): the virtual time of a job grows by its seconds divided by
its share, and the job with the least goes next, for one *turn*. A turn lasts until the first boundary between two
optimizer steps at which it has had `least_s`; an evaluation, or the end of the job, may end it earlier.

Let T_i be the longest turn of job i, but no less than `least_s`. Then, over any time in which jobs i and j are both
there, their seconds differ by

    |seconds_i / share_i - seconds_j / share_j|  ≤  T_i / share_i + T_j / share_j

Proof. Let M be the least virtual time of the jobs that are there. Whoever gets the turn has M, so at its end it has at
most M + T_i / share_i; a newcomer begins at M + least_s / share_i. M never falls, so that every job is at any time
between M and M + T_i / share_i; take the difference of two jobs at both ends of the interval.

A newcomer begins one shortest turn behind M, not at M: jobs that come and go for ever would else keep M where it is,
and a job that is ahead of M would wait for ever. As it is, no job joins those below M + least_s / share, each turn of
those takes them nearer to it, and so M rises.
"""

LEAST_TURN_S = (0.5, 10.0)
"""Bounds of a turn's least length, in seconds of quanta."""
SWAP_PART = 0.02
"""Part of training that swaps may take: between those bounds a turn is at least so much longer than the last swap."""


class Turns:
    """The jobs that wait for the trainer, and the one that has it.

    >>> turns = Turns()
    >>> turns.join("support/7", share=2.0)
    >>> turns.choose()
    'support/7'
    """

    def __init__(self) -> None:
        self.least_s = LEAST_TURN_S[0]
        """Least length of a turn."""
        self._evaluations: list[str] = []
        self._shares: dict[str, float] = {}
        self._virtual: dict[str, float] = {}
        self._holder: str | None = None
        self._had_s = 0.0
        """Seconds that the holder has had in its turn."""

    @property
    def jobs(self) -> list[str]:
        """Return the jobs that have joined and not left."""
        return [*self._evaluations, *self._shares]

    def join(self, job: str, share: float | None) -> None:
        """Add a training job with its share, a positive number, or an evaluation (None)."""
        if share is None:
            self._evaluations.append(job)
        else:
            least = min(self._virtual.values(), default=0.0)
            self._shares[job], self._virtual[job] = share, least + self.least_s / share

    def leave(self, job: str) -> None:
        """Remove a job that has ended."""
        if job in self._shares:
            del self._shares[job], self._virtual[job]
        else:
            self._evaluations.remove(job)

    def ran(self, job: str, seconds: float) -> None:
        """Count a quantum of a job, which may have left meanwhile."""
        if job in self._shares:
            self._virtual[job] += seconds / self._shares[job]
        if job == self._holder:
            self._had_s += seconds

    def swapped(self, seconds: float) -> None:
        """Note how long handing the buffers over took last, so that turns are long enough for it."""
        shortest, longest = LEAST_TURN_S
        self.least_s = min(max(shortest, seconds / SWAP_PART), longest)

    def choose(self) -> str | None:
        """Return the job that goes on now, at a boundary of the holder or after its end; None where there is none."""
        if self._evaluations:
            return self._begin(self._evaluations[0])
        if self._holder in self._virtual and self._had_s < self.least_s:
            return self._holder
        return self._begin(min(self._virtual, key=self._virtual.__getitem__, default=None))

    def _begin(self, job: str | None) -> str | None:
        self._holder, self._had_s = job, 0.0
        return job
