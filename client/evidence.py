"""What is known of a shadow before users meet it: losses on held-out examples and guards, beside what answers now."""

from collections.abc import Callable
from pathlib import Path

from client.jobs import Jobs
from client.journal import Journal
from client.verdict import Probe
from serving.scores import Scores
from umbel.adapter import AdapterRef
from umbel.config import SiteConfig


class Evidence:
    """Asks the co-trainer, and remembers what it said of versions that still matter. `folder` says where one lies."""

    def __init__(self, config: SiteConfig, journal: Journal, jobs: Jobs, folder: Callable[[AdapterRef], Path]) -> None:
        self._config = config
        self._journal = journal
        self._jobs = jobs
        self._folder = folder
        self._known: dict[tuple[AdapterRef | None, str | None], Scores] = {}

    async def probe(self, ref: AdapterRef) -> Probe:
        """Base, live and shadow on the held-out examples; on each guard the shadow and what answers users now.

        Raises EngineGone, TrainingError.
        """
        live = self._journal.alias(ref.name, "live")
        subjects: dict[str, AdapterRef | None] = {"base": None, **({"live": live} if live else {}), "shadow": ref}
        rivals = {role: subjects[role] for role in ("live" if live else "base", "shadow")}
        probe = Probe(
            {role: await self._scores(subject) for role, subject in subjects.items()},
            {
                guard.name: {role: await self._scores(subject, guard.name) for role, subject in rivals.items()}
                for guard in self._config.shadow.guard
            },
        )
        if self._journal.alias(ref.name, "live") != live:  # the evidence is against what answers users no more
            return await self.probe(ref)
        self._known = {asked: scores for asked, scores in self._known.items() if asked[0] in subjects.values()}
        return probe

    def forget(self) -> None:
        """Ask anew from now on: what was measured may not be what lies there."""
        self._known.clear()

    async def _scores(self, subject: AdapterRef | None, guard: str | None = None) -> Scores:
        """What is known already is not asked again."""
        if (subject, guard) not in self._known:
            self._known[subject, guard] = await self._jobs.evaluate(self._folder(subject) if subject else None, guard)
        return self._known[subject, guard]
