"""`Finding`, `Report`: what each check found, as figures and an outcome; the whole is one JSON."""

import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Figures = Mapping[str, Any]
"""Name → number, text, or further figures."""


@dataclass(frozen=True)
class Finding:
    """The figures of a check, and the reason if it failed or was left out."""

    figures: Figures = field(default_factory=dict)
    failed: str = ""
    skipped: str = ""

    @property
    def outcome(self) -> str:
        return "failed" if self.failed else "skipped" if self.skipped else "passed"


@dataclass
class Report:
    """Everything that was found, in the order of the checks."""

    say: Callable[[str], None]
    checks: list[dict[str, Any]] = field(default_factory=list)

    async def run(self, name: str, check: Callable[[], Awaitable[Finding]]) -> None:
        """Run one check, and note what it found; an exception fails the check and ends none of the others."""
        began = time.perf_counter()
        try:
            finding = await check()
        except Exception as error:
            finding = _raised(error)
        self._note(name, finding, time.perf_counter() - began)

    def run_now(self, name: str, check: Callable[[], Finding]) -> None:
        """Run one check that has an event loop of its own, as `run` does."""
        began = time.perf_counter()
        try:
            finding = check()
        except Exception as error:
            finding = _raised(error)
        self._note(name, finding, time.perf_counter() - began)

    def _note(self, name: str, finding: Finding, seconds: float) -> None:
        why = finding.failed or finding.skipped
        self.say(f"{name}: {finding.outcome}{f' ({why})' if why else ''}")
        self.checks.append(
            {
                "name": name, "outcome": finding.outcome, "reason": why, "seconds": round(seconds, 2),
                "figures": dict(finding.figures),
            }
        )  # fmt: skip

    @property
    def failed(self) -> list[str]:
        """Return the names of the checks that failed."""
        return [check["name"] for check in self.checks if check["outcome"] == "failed"]

    def json(self, facts: Figures) -> str:
        """Return the report as JSON, with facts of the machine and of the run before the checks."""
        report = {**facts, "passed": not self.failed, "checks": self.checks}
        return json.dumps(_without_infinities(report), indent=2, default=str, allow_nan=False)


def _without_infinities(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, Mapping):
        return {key: _without_infinities(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _raised(error: Exception) -> Finding:
    return Finding(failed=f"{type(error).__name__}: {error}")
