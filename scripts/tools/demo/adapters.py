"""`TwoAdapters`: the demo with two tenants, two federations over the same sites, SuperNodes and registry, at once."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.tools.demo.events import ENDS, describe, not_answered, probe_row, round_row, without_an_end
from scripts.tools.demo.run import Demo, prompt_of
from scripts.tools.demo.site import DemoSite
from scripts.tools.demo.users import Users
from scripts.tools.repository import REPOSITORY
from server.bundle import export

TASK_OF = {"support": "clinic", "billing": "shop"}
"""Adapter → the task that it learns; every site has a part of the examples of both."""
SLOWER = 3.0
"""Times as long as those of the demo with one adapter do users wait between two questions: they are three at each site,
one for each name."""
Files = tuple[Path, Path]
"""Training file, held-out file."""


class TwoAdapters(Demo):
    """One run of the demo with the adapters `support` and `billing`."""

    def run(self) -> int:
        """Run every step; return the exit status."""
        self.make_keys()
        bases = self.build_bases()
        data = self.write_data()
        for index, site in enumerate(self.sites):
            self.start_two(site, bases[site.name], self.part(index, data))
        self.start_users(data)
        flower = self.start_flower()
        app = export(REPOSITORY, self.out / "app")
        events = self.follow([self.start_run(flower, app, adapter) for adapter in TASK_OF])
        self.stop_users()
        return self.conclude(self.measured(dict.fromkeys(data, bases[self.sites[0].name]), data, events))

    def write_data(self) -> dict[str, Files]:
        """Write the examples of both tasks."""
        return {task: self.setting.write_data(task, self.out / "data" / task) for task in TASK_OF.values()}

    def part(self, index: int, data: Mapping[str, Files]) -> dict[str, Files]:
        """Write a site's part of each task's examples; return adapter → its files. All held-out examples are there."""
        parts = {}
        for adapter, task in TASK_OF.items():
            train, heldout = data[task]
            own = train.with_name(f"{self.sites[index].name}.jsonl")
            own.write_text("".join(train.read_text().splitlines(keepends=True)[index :: len(self.sites)]))
            parts[adapter] = (own, heldout)
        return parts

    def start_two(self, site: DemoSite, base: Path, parts: dict[str, Files]) -> None:
        """Start one site with both adapters and wait until its engine answers."""
        self.say(f"{site.name}: starting SGLang on port {site.port} ({' and '.join(parts)})")
        with self.console.status("about a minute: SGLang imports, loads the base, warms up"):
            site.start(base, next(iter(parts.values())), self.processes, parts)

    def start_users(self, data: dict[str, Files]) -> None:
        """Let users ask every site for both adapters and for the base, until `stop_users`."""
        prompts = {
            task: [prompt_of(json.loads(line)) for line in heldout.read_text().splitlines()]
            for task, (_, heldout) in data.items()
        }
        every = [prompt for asked in prompts.values() for prompt in asked]
        models = {adapter: prompts[task] for adapter, task in TASK_OF.items()} | {self.setting.served_name: every}
        few, many = self.setting.think_s
        for site in self.sites:
            for model, asked in models.items():
                learns = lambda name=site.name: self.training[name]  # noqa: E731
                think_s = (SLOWER * few, SLOWER * many)
                users = Users(site.url, model, asked, learns, len(self.users), think_s)
                self.users[f"{site.name}, {model}"] = users
                users.start()
        self.watch_training()
        self.say(f"users are being answered at {', '.join(site.name for site in self.sites)}: {', '.join(models)}")

    def told_of(self, event: dict[str, Any]) -> str:
        """Return the line for an event, with the adapter that it is about."""
        return f"{event['adapter']:<7}  {describe(event)}"

    def measured(
        self, bases: dict[str, Path], data: dict[str, Files], events: list[dict[str, Any]]
    ) -> dict[str, Any]:  # fmt: skip
        """Measure the base and every version of both adapters on both tasks; return the content of `summary.json`."""
        subjects = {name: weights for adapter in TASK_OF for name, weights in self.versions(adapter).items()}
        aliases = {site.name: site.status()["aliases"] for site in self.sites}
        live = {site: {adapter: found[adapter]["live"] for adapter in TASK_OF} for site, found in aliases.items()}
        return {
            "sites": {site: {"live": found} for site, found in live.items()},
            "tasks": sorted(data),
            "quality": self.examine(bases, data, subjects),
            "told": "Each adapter has learned its own task, from all sites, and nothing of the other tenant's.",
            "probes": [probe_row(event) for event in events if event["event"] == "site.judged"],
            "rounds": [_named(event) for event in events if event["event"] in ENDS],
            "users": {who: {**users.summary(), "model": users.model} for who, users in self.users.items()},
            "answers": {},
            "minutes": round((time.monotonic() - self.started) / 60, 1),
        }

    def promises(self, summary: dict[str, Any]) -> list[str]:
        """Return a line for each promise that was not kept."""
        return broken_promises(summary, self.rounds)

    def _site(self, index: int) -> DemoSite:
        name = f"branch-{'abcdefgh'[index]}"
        return DemoSite(name, "", self.out / name, self.keys, self.setting)


def broken_promises(summary: Mapping[str, Any], rounds: int) -> list[str]:
    """Return a line for each promise of the demo with two adapters that was not kept; empty if all were."""
    broken = not_answered(summary["users"])
    for who, users in summary["users"].items():
        strangers = {version for version in users["answers_by_version"] if not _may_answer(version, users["model"])}
        broken += [f"{who}: {version} answered, another tenant's" for version in sorted(strangers)]
    for adapter in TASK_OF:
        own = [row for row in summary["rounds"] if row["adapter"] == adapter]
        broken += [f"{adapter}: {line}" for line in without_an_end(own, rounds)]
        live = {str(site["live"][adapter]) for site in summary["sites"].values()}
        if len(live) != 1 or "None" in live:
            broken.append(f"{adapter}: the sites do not serve one promoted version: {', '.join(sorted(live))}")
    return broken


def _may_answer(version: str, model: str) -> bool:
    """Return whether users who ask for `model` may be answered by a version; `base` stands for all names at first."""
    return version == "base" or version.partition("@")[0] == model


def _named(event: dict[str, Any]) -> dict[str, Any]:
    row = round_row(event)
    return {**row, "adapter": event["adapter"], "round": f"{event['adapter']} {row['round']}"}
