"""`AdaptScreen`: the lines that `umbel adapt` prints, from the events of its rounds."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from umbel.site.config import SiteConfig

STALLED = 3
"""Rounds in a row without a promotion after which it is said what would help; again after as many more."""
HELP = {
    "keep": (
        "the site cannot tell them from what answers now: it may have learned what its examples hold. New examples "
        "would help, or more held-out ones ([training].eval_data), on which smaller gains show"
    ),
    "reject": (
        "they are worse on the held-out examples. Gentler training would help (--set learning-rate={learning_rate:g}, "
        "half of now, or fewer --set steps=…), or more examples"
    ),
    "": "no verdict was given; the lines above say why",
}
"""A site's decision → what would help where it is the most frequent one."""


class AdaptScreen:
    """Turns events into lines for people. `head` says from which version the next round trains.

    >>> screen = AdaptScreen(config, "support", Path("clinic-a.toml"), url, learning_rate=2e-3, head=lambda: "v2")
    >>> screen.lines({"event": "round.promoted", "round": 3, "version": 3})
    ["round 3: v3 answers users of 'support' now", …]
    """

    def __init__(
        self, config: SiteConfig, adapter: str, site_file: Path, url: str, *, learning_rate: float,
        head: Callable[[], str],
    ) -> None:  # fmt: skip
        self._config = config
        self._adapter = adapter
        self._site_file = site_file
        self._url = url
        self._learning_rate = learning_rate
        self._head = head
        self._decisions: Counter[str] = Counter()
        """Decisions of the rounds since the last promotion, by how they ended."""
        self._decision = ""
        self._skipped = ""
        """Why the last round was skipped; such rounds follow one another, and are told once."""
        self._told = False
        """True once it was said how to ask the adapter."""

    def lines(self, event: Mapping[str, Any]) -> list[str]:
        """Return the lines of an event; none for one that people need not see."""
        kind = event["event"].replace(".", "_")
        make: Callable[[Mapping[str, Any]], Iterator[str]] | None = getattr(self, f"_{kind}", None)
        number = f"round {event['round']}: " if "round" in event else ""
        return [number + line if line and not line[0].isspace() else line for line in make(event)] if make else []

    def _fleet_reconciled(self, event: Mapping[str, Any]) -> Iterator[str]:
        live = event["live"]
        for site, before in event["brought"].items():
            yield f"{site}: {live} answers users, as the registry says, instead of {before}"
        for site, why in {**event["kept"], **event["missed"]}.items():
            yield f"{site}: {live} is live in the registry, and does not answer users here: {why}"

    def _round_started(self, event: Mapping[str, Any]) -> Iterator[str]:
        self._decision = ""
        if not self._skipped:
            yield f"trains from {self._head()}"

    def _site_trained(self, event: Mapping[str, Any]) -> Iterator[str]:
        self._skipped = ""
        loss = float(event["loss_sum"]) / event["num_loss_tokens"] if event["num_loss_tokens"] else float("nan")
        yield (
            f"{event['steps']} steps in {event['seconds']:.0f} s, {event['share']:.0%} of them spent on training; "
            f"training loss {loss:.4f} nats per token"
        )

    def _site_skipped(self, event: Mapping[str, Any]) -> Iterator[str]:
        if not self._skipped:
            yield f"{event['reason']}; nothing is trained, and the site is asked again and again"
        self._skipped = event["reason"]

    def _round_published(self, event: Mapping[str, Any]) -> Iterator[str]:
        yield f"v{event['version']} is loaded beside what answers now, and both are measured on held-out examples"

    def _site_judged(self, event: Mapping[str, Any]) -> Iterator[str]:
        verdict = event["verdict"]
        if verdict is not None:
            self._decision = verdict["decision"]
            word = {"promote": "better", "keep": "undecided", "reject": "worse"}[self._decision]
            yield f"{word}: {'; '.join(verdict['reasons'])}"

    def _round_promoted(self, event: Mapping[str, Any]) -> Iterator[str]:
        self._decisions.clear()
        yield f"v{event['version']} answers users of {self._adapter!r} now"
        if not self._told:
            self._told = True
            yield f"    ask it:   {self._question()}"
            yield f"    go back:  umbel rollback {shlex.quote(str(self._site_file))} {self._adapter}"

    def _round_rejected(self, event: Mapping[str, Any]) -> Iterator[str]:
        unheard = "" if self._decision else f" ({_told(event['reasons'])})"
        yield f"v{event['version']} is discarded{unheard}; the next round trains from {self._head()}"
        yield from self._stalled()

    def _round_failed(self, event: Mapping[str, Any]) -> Iterator[str]:
        self._decision = ""
        yield f"it made no version: {_told(event['reasons'])}"
        yield from self._stalled()

    def _stalled(self) -> Iterator[str]:
        """Yield what would help, when no version was promoted in so many rounds."""
        self._decisions[self._decision] += 1
        if (rounds := self._decisions.total()) % STALLED:
            return
        most = max(self._decisions, key=lambda decision: self._decisions[decision])
        helps = HELP[most].format(learning_rate=self._learning_rate / 2)
        yield f"    no version was promoted in the last {rounds} rounds: {helps}"
        yield "    it goes on; docs/how-to/decide-what-is-promoted.md says how versions are judged"

    def _question(self) -> str:
        """Return a command that asks the adapter."""
        config = self._config
        keys = [config.engine.api_keys, *(a.api_keys for a in config.adapter), *(s.api_keys for s in config.serve)]
        key = "-H 'authorization: Bearer KEY' " if any(keys) else ""
        body = json.dumps({"model": self._adapter, "messages": [{"role": "user", "content": "YOUR QUESTION"}]})
        return f"curl -s {self._url}/v1/chat/completions -H 'content-type: application/json' {key}-d '{body}'"


def _told(reasons: Mapping[str, str]) -> str:
    """Return the reasons of a round's end, those of the site first."""
    by_site = [why for site, why in reasons.items() if site != "*"]
    return "; ".join(by_site or reasons.values()) or "no reason was given"
