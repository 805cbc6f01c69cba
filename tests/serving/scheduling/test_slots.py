"""Slots: no adapter, nor the base, waits for ever beside busy ones; with SGLang's own rules of admission."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.lora import lora_drainer
from sglang.srt.lora.lora_drainer import LoRADrainer
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.managers.scheduler import Scheduler

from serving.priorities import Priority
from serving.scheduling.slots import WAIT_S, Adapter, FairDrainer, drain_fairly

STEP_S = 0.02
"""Seconds of one decoding step of the toy engine."""
MOST = 64
"""Requests in its batch."""


class Request:
    """What the scheduler knows of a request."""

    def __init__(self, adapter: Adapter, tokens: int, came: float, priority: int | None = None) -> None:
        self.lora_id, self.priority = adapter, priority
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(max_new_tokens=tokens)
        self.time_stats = SimpleNamespace(wait_queue_entry_time=came)

    def finished(self) -> bool:
        return len(self.output_ids) >= int(self.sampling_params.max_new_tokens)


class Engine:
    """A queue and a batch, with admission as in `Scheduler._get_new_batch_prefill_raw`; a step is a token for each."""

    def __init__(self, slots: int, drainer: Any = None) -> None:
        self.now = 1000.0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.begun: Counter[Adapter] = Counter()
        self.longest: dict[Adapter, float] = {}
        self.slots = slots
        manager = SimpleNamespace(max_loras_per_batch=slots, num_pinned_loras=0)
        manager.validate_lora_batch = lambda ids: LoRAManager.validate_lora_batch(manager, ids)
        self.scheduler: Any = SimpleNamespace(
            lora_drainer=drainer or FairDrainer(slots, lambda: self.now),
            enable_lora_overlap_loading=False,
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
        )

    def ask(self, adapter: Adapter, tokens: int = 16, priority: int | None = None) -> None:
        self.waiting.append(Request(adapter, tokens, self.now, priority))

    def step(self) -> None:
        self.now += STEP_S
        loras = {req.lora_id for req in self.running}
        if self.waiting:
            self.scheduler.lora_drainer.update_draining_state(self.waiting, self.running)
        for req in list(self.waiting):
            may = len(self.running) < MOST and Scheduler.can_schedule_lora_req(self.scheduler, req, loras)
            if may:
                loras.add(req.lora_id)
                self.waiting.remove(req)
                self.running.append(req)
                self.begun[req.lora_id] += 1
                waited = self.now - req.time_stats.wait_queue_entry_time
                self.longest[req.lora_id] = max(waited, self.longest.get(req.lora_id, 0.0))
        assert len({req.lora_id for req in self.running}) <= self.slots
        for req in self.running:
            req.output_ids.append(0)
        self.running = [req for req in self.running if not req.finished()]

    def run(self, steps: int, **every: int) -> None:
        """Run; each adapter is asked every so many steps, `base` is the base."""
        for number in range(steps):
            for name, steps_between in every.items():
                if number % steps_between == 0:
                    self.ask(None if name == "base" else name)
            self.step()


@pytest.mark.parametrize("quiet", ["quiet", "base"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_quiet_adapter_and_the_base_have_their_turn_beside_two_that_never_pause(quiet: str, every: int) -> None:
    engine = Engine(slots=2)
    engine.run(3000, busy=every, busier=every, **{quiet: 200})
    asked = 3000 // 200
    name = None if quiet == "base" else quiet
    assert engine.begun[name] == asked
    assert engine.longest[name] <= WAIT_S + 17 * STEP_S + STEP_S, "the wait, and what was left of the shortest answers"
    for busy in ("busy", "busier"):
        assert engine.begun[busy] + len([req for req in engine.waiting if req.lora_id == busy]) == 3000 // every
        assert engine.longest.get(busy, 0.0) < WAIT_S, "nobody gives up a slot for longer than a turn"


@pytest.mark.parametrize("quiet", ["quiet", "base"])
def test_sglangs_own_ways_let_it_wait_for_ever(monkeypatch: pytest.MonkeyPatch, quiet: str) -> None:
    """The reason for `FairDrainer`: where this fails, SGLang has learnt it, and its own drainer may do."""
    for threshold in (1e9, WAIT_S):  # without a drainer, and with SGLang's
        engine = Engine(slots=2, drainer=LoRADrainer(2, threshold))
        monkeypatch.setattr(lora_drainer, "time", SimpleNamespace(monotonic=lambda: engine.now))  # noqa: B023
        engine.run(3000, busy=1, busier=1, **{quiet: 200})
        assert engine.begun[None if quiet == "base" else quiet] == 0


def test_more_adapters_than_slots_share_them_by_turns() -> None:
    engine = Engine(slots=3)
    names = ["base", *"abcde"]
    engine.run(6000, **dict.fromkeys(names, 20))
    counts = [engine.begun[None if name == "base" else name] for name in names]
    assert max(counts) - min(counts) <= 20, counts
    assert sum(counts) + len(engine.waiting) == 6 * 300
    assert max(engine.longest.values()) <= 2 * WAIT_S + 40 * STEP_S


def test_where_there_are_slots_for_all_nobody_waits_for_another() -> None:
    engine = Engine(slots=4)
    engine.run(1000, a=1, b=2, c=3, base=5)
    assert engine.waiting == []
    assert max(engine.longest.values()) <= STEP_S * 1.001


def test_who_gives_up_a_slot_is_whose_answers_may_end_first_and_goes_on_to() -> None:
    engine = Engine(slots=2)
    turns = engine.scheduler.lora_drainer
    engine.ask("long", 500)
    engine.ask("short", 200)
    engine.step()
    engine.ask("quiet")
    engine.run(round(WAIT_S / STEP_S) + 1)
    may = [turns.can_schedule(Request(name, 1, engine.now)) for name in ("long", "short", "quiet")]
    assert may == [True, False, False]
    engine.ask("long", 1)
    engine.waiting.insert(0, Request("short", 1, engine.now - 1))  # as retracted ones come back to the front
    engine.run(80)
    assert (engine.begun["long"], engine.begun["short"], engine.begun["quiet"]) == (2, 1, 0)
    engine.run(20)
    assert (engine.begun["short"], engine.begun["quiet"]) == (1, 1), "the 200 tokens have ended, and it is its turn"
    engine.run(20)
    assert engine.begun["short"] == 2, "and then it has its slot back"
    assert engine.waiting == []


def test_a_slot_that_is_kept_for_one_is_not_taken_by_who_came_later() -> None:
    engine = Engine(slots=2)
    engine.ask("a", 300)
    engine.ask("b", 130)
    engine.step()
    engine.ask("first")
    engine.run(round(WAIT_S / STEP_S) + 1)
    engine.waiting.insert(0, Request("urgent", 16, engine.now))  # as with a class that goes first
    engine.run(30)
    assert (engine.begun["first"], engine.begun["urgent"]) == (1, 0)
    engine.run(20)
    assert engine.begun["urgent"] == 1


@pytest.mark.parametrize(("priority", "turns"), [(None, 1), (Priority.INTERACTIVE, 1), (Priority.BATCH, 1),
                                                 (Priority.MIRROR, 0), (Priority.CHECK, 0)])  # fmt: skip
def test_only_what_a_user_or_the_daemon_waits_for_claims_a_slot(priority: int | None, turns: int) -> None:
    engine = Engine(slots=2)
    engine.ask("shadow", priority=priority)
    engine.waiting[0].time_stats.wait_queue_entry_time = 0.0
    engine.waiting = [Request("a", 100, engine.now), Request("b", 100, engine.now), *engine.waiting]
    for number in range(400):
        if number % 20 == 0:
            engine.ask("a", 100)
            engine.ask("b", 100)
        engine.step()
    assert engine.begun["shadow"] == turns


def test_the_scheduler_gets_it_with_its_own_number_of_slots() -> None:
    scheduler = SimpleNamespace(max_loras_per_batch=7, lora_drainer=None)
    drain_fairly(None, scheduler)
    assert isinstance(scheduler.lora_drainer, FairDrainer)
    assert scheduler.lora_drainer._slots == 7
