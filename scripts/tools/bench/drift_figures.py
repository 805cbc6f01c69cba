"""`Run`: what `scripts/bench_drift` found of one system in one run, and `show`, the table of them. Pure."""

import statistics
from collections.abc import Callable, Sequence

from pydantic import BaseModel

RECOVERED = 0.95
"""Part of the quality before the change that counts as recovered."""


class Point(BaseModel):
    """Optimizer steps that the engine had taken at one time; seconds of the run."""

    at: float
    steps: int


class Served(BaseModel):
    """A version, the time from which users got it, and (loss, part answered exactly) at the old and the new task."""

    version: int
    at: float
    old: tuple[float, float]
    new: tuple[float, float]


class Run(BaseModel):
    """One system over all phases: it learns for `learn` seconds, `same` more nothing changes, then the data do."""

    system: str
    workload: str
    learn: float
    same: float
    points: list[Point]
    served: list[Served]
    tokens_per_step: float
    """Answer tokens."""
    rounds: int
    skipped: int
    """Rounds in which the site said that nothing was worth training."""

    @property
    def changed_at(self) -> float:
        """Return the time of the first change."""
        return self.learn + self.same

    @property
    def tokens_same(self) -> float:
        """Return the answer tokens trained while nothing changed."""
        return self._tokens(self.learn, self.changed_at)

    @property
    def before(self) -> tuple[float, float]:
        """Return loss and part answered exactly, of the old task, by the version that answered at the change."""
        live = [one for one in self.served if one.at <= self.changed_at]
        return live[-1].old if live else (float("nan"), 0.0)

    @property
    def recovered_s(self) -> float:
        """Return the seconds from the change to a version that has `RECOVERED` of the old quality; infinite: none."""
        wanted = RECOVERED * self.before[1]
        found = [one.at for one in self.served if one.at > self.changed_at and one.new[1] >= wanted]
        return found[0] - self.changed_at if found else float("inf")

    @property
    def tokens_changed(self) -> float:
        """Return the answer tokens trained from the change to the recovery, or to the end."""
        return self._tokens(self.changed_at, self.changed_at + self.recovered_s)

    @property
    def tokens(self) -> float:
        """Return all answer tokens that were trained."""
        return self._tokens(0.0, float("inf"))

    @property
    def line(self) -> str:
        loss, exact = self.before
        return (
            f"before the change loss {loss:.3f}, exact {exact:.0%}; recovered after {self.recovered_s:.0f} s; answer "
            f"tokens: {self.tokens_same:.0f} while nothing changed, {self.tokens_changed:.0f} to recover, "
            f"{self.tokens:.0f} in all; {self.skipped} of {self.rounds} rounds not worth training"
        )

    def _tokens(self, begin: float, end: float) -> float:
        inside = [point.steps for point in self.points if begin <= point.at <= end]
        return self.tokens_per_step * (inside[-1] - inside[0]) if inside else 0.0


COLUMNS: dict[str, Callable[[Run], float]] = {
    "exact before": lambda run: run.before[1],
    "loss before": lambda run: run.before[0],
    "tokens while nothing changed": lambda run: run.tokens_same,
    "seconds to recover": lambda run: run.recovered_s,
    "tokens to recover": lambda run: run.tokens_changed,
    "tokens in all": lambda run: run.tokens,
}


def show(runs: Sequence[Run], workload: str) -> str:
    """Return a Markdown table: a row for each system, medians over its runs with all of them behind."""
    lines = [f"| {workload} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for system in dict.fromkeys(run.system for run in runs):
        cells = []
        for figure in COLUMNS.values():
            values = [figure(run) for run in runs if run.system == system]
            each = f" ({', '.join(f'{value:.3g}' for value in values)})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.4g}{each}")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
