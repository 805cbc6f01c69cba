"""Versions, manifests, reports and orders for tests of a site's journal."""

from typing import Any

from client.journal import Journal
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.messages import RoundOrder, ShadowReport, TrainPlan

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


def manifest(ref: AdapterRef, **changes: Any) -> AdapterManifest:
    fields: dict[str, Any] = {
        "name": ref.name, "version": ref.version, "digest": f"{ref.version:064x}", "base": "0" * 64, "lineage": "l",
        "round": ref.version, "rank": 4, "target_modules": ("q_proj",),
    }  # fmt: skip
    return AdapterManifest(**{**fields, **changes})


def report(ref: AdapterRef, state: Lifecycle = Lifecycle.CANDIDATE, **more: Any) -> ShadowReport:
    return ShadowReport(ref=str(ref), state=state, **more)


def make_live(journal: Journal, ref: AdapterRef, event: str = "promoted") -> None:
    """Add a version, unless it is there, and make it live."""
    journal.add(manifest(ref), report(ref))
    if journal.get(ref).state is Lifecycle.CANDIDATE:
        judge(journal, ref)
    journal.make_live(ref, event)


def judge(journal: Journal, ref: AdapterRef, **more: Any) -> None:
    """Take a candidate to its verdict."""
    journal.move(ref, report(ref, Lifecycle.PROBING))
    journal.report(ref, report(ref, Lifecycle.JUDGED, **more))


def order(key: str, **changes: Any) -> RoundOrder:
    plan = TrainPlan(rank=4, steps=1, seconds=1.0)
    return RoundOrder(**{"key": key, "base": "b", "parent": "p", "round": 1, "plan": plan, **changes})
