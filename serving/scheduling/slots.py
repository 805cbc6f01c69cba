"""`FairDrainer`: drains the slot of a busy adapter for one that waits, so that nobody keeps a slot for ever.

A batch has requests of at most `slots` adapters, of which the base is one. Those of a further adapter wait until an
adapter has no request in the batch, which never comes while each of them is asked for again before its last answer has
ended. So once requests of an adapter have waited for `WAIT_S`, one that has a slot begins no more requests: the one
whose answers may end first. Its slot goes to the adapter that has waited longest.

SGLang has a drainer of its own (`--lora-drain-wait-threshold`), whose place this one takes. That one goes on to
begin requests that are about as short as what is left of those that run, so that equal requests, of which the next
comes before a sixth of the last one is answered, keep a slot for ever; and it makes no room for the base.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from serving.priorities import Priority

WAIT_S = 2.0
"""Seconds that a user's request waits for a slot of its adapter before another adapter is to give up its own."""
Adapter = str | None
"""SGLang's id of a loaded version; None is the base."""


class FairDrainer:
    """Takes the place of SGLang's `LoRADrainer`, with the same two methods."""

    def __init__(self, slots: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._slots, self._clock = slots, clock
        self._yielding: frozenset[Adapter] = frozenset()
        self._admitted: set[Adapter] = set()
        self._free = 0

    def update_draining_state(self, waiting_queue: Iterable[Any], running_reqs: Iterable[Any]) -> None:
        """Decide, before requests are taken from the queue, who gives up a slot and for whom free ones are kept.

        Only users' own requests can claim a slot: neither the router's replays on a shadow, nor checks.
        """
        left: dict[Adapter, int] = {}
        for req in running_reqs:
            if not req.finished():
                tokens = req.sampling_params.max_new_tokens - len(req.output_ids)
                left[req.lora_id] = max(left.get(req.lora_id, 0), tokens)
        since: dict[Adapter, float] = {}
        for req in waiting_queue:
            if req.lora_id not in left and (req.priority is None or req.priority >= Priority.BATCH):
                came = req.time_stats.wait_queue_entry_time
                since[req.lora_id] = min(came, since.get(req.lora_id, came))
        latest = self._clock() - WAIT_S
        claims = sorted((adapter for adapter in since if since[adapter] <= latest), key=lambda one: since[one])
        free = max(0, self._slots - len(left))
        # Who gives up a slot already goes on to do so; else whose answers may end first.
        soonest = sorted(left, key=lambda one: (one not in self._yielding, left[one]))
        self._yielding = frozenset(soonest[: max(0, len(claims) - free)])
        self._admitted = {*left, *claims[:free]}
        self._free = max(0, free - len(claims))

    def can_schedule(self, req: Any) -> bool:
        """Return whether a waiting request may begin, as far as slots go; SGLang asks in the order of its queue."""
        if req.lora_id in self._yielding:
            return False
        if req.lora_id not in self._admitted:
            if not self._free:
                return False
            self._free -= 1
            self._admitted.add(req.lora_id)
        return True


def drain_fairly(result: None, scheduler: Any) -> None:
    """AFTER `Scheduler.init_lora_drainer`: put a `FairDrainer` in the place of SGLang's own drainer."""
    scheduler.lora_drainer = FairDrainer(scheduler.max_loras_per_batch)
