"""`Hooks`: calls the co-trainer from SGLang's Scheduler. A failure in here costs the training, never the engine.

`serving.plugin` registers them.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from serving import engine_state
from serving.cotrainer.cotrainer import CoTrainer
from serving.cotrainer.lanes.streams import engine_streams
from serving.cotrainer.memory import Reserve
from serving.trainer_socket import CoTrainerSettings
from umbel.base.shapes import read_config
from umbel.site.memory import CPU_ROOM, Training, choose_rung, kv_bytes_per_token

logger = logging.getLogger(__name__)


class Hooks:
    """Six moments of the scheduler. Without `trainer.json` in the run directory the engine only serves."""

    def __init__(self, run_dir: Path, cotrainer_type: type[CoTrainer] = CoTrainer) -> None:
        self.run_dir = run_dir
        self.cotrainer_type = cotrainer_type
        self.cotrainer: CoTrainer | None = None
        self._state = engine_state.opened(run_dir)
        self._reserve = Reserve()
        self._logged = ""

    def leave_room(self, available_bytes: int, cache: Any, *args: Any, **kwargs: Any) -> int:
        """AFTER `KVCacheConfigurator._profile_available_bytes`: keep memory for training out of the KV cache."""
        try:
            settings = CoTrainerSettings.read(self.run_dir)
            available_bytes, self._reserve = reserve_memory(available_bytes, settings, cache)
        except Exception as error:
            self._give_up(error)
        return available_bytes

    def after_init(self, result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AFTER `Scheduler.__init__`: build and calibrate the trainer, before the engine reports ready."""
        try:
            settings = CoTrainerSettings.read(self.run_dir)
            if settings is None:
                return
            if self._reserve.mb is not None:
                settings = settings.model_copy(update={"memory_mb": self._reserve.mb})
            cotrainer = self.cotrainer_type(settings, self.run_dir)
            cotrainer.footprint.kv_tokens_given_up = self._reserve.kv_tokens
            scheduler.idle_sleeper.poller.register(cotrainer.commands.socket, zmq.POLLIN)
            cotrainer.idle_poller = scheduler.idle_sleeper.poller
            self.cotrainer = cotrainer
            cotrainer.streams = engine_streams(scheduler)
            cotrainer.build(scheduler.tp_worker.model_runner.model, scheduler.server_args.model_path)
        except Exception as error:
            self._give_up(error)

    def before_iteration(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """BEFORE `Scheduler.get_next_batch_to_run`, which fires every iteration, idle or busy."""
        if self.cotrainer is None:
            return
        try:
            self.cotrainer.between_iterations(scheduler)
        except Exception as error:
            self._give_up(error)

    def before_batch(self, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        """BEFORE `Scheduler.run_batch`: count the batch, and note it for the iteration."""
        if self._state is not None:
            self._state.count_batch()
        if self.cotrainer is None:
            return
        try:
            self.cotrainer.observer.starts(batch)
        except Exception as error:
            self._give_up(error)

    def after_batch(self, result: None, *args: Any, **kwargs: Any) -> None:
        """AFTER `Scheduler.process_batch_result`: the iteration of a batch has ended."""
        if self.cotrainer is not None:
            self.cotrainer.observer.processed(time.perf_counter())

    def around_sleep(self, sleep: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND `Scheduler.maybe_sleep_on_idle`, the only place where an idle scheduler sleeps: train instead."""
        try:
            trained = self.cotrainer is not None and self.cotrainer.instead_of_sleep()
        except Exception as error:
            trained = False
            self._give_up(error)
        if not trained:
            sleep(scheduler, *args, **kwargs)
            if self.cotrainer is not None:
                self.cotrainer.observer.nothing_came(time.perf_counter())

    def _give_up(self, error: Exception) -> None:
        """End the job and let the engine serve on."""
        if repr(error) != self._logged:  # the same error may come with every iteration
            self._logged = repr(error)
            logger.exception("co-training failed; serving goes on")
        if self.cotrainer is not None:
            self.cotrainer.fail(error)


def reserve_memory(available_bytes: int, settings: CoTrainerSettings | None, cache: Any) -> tuple[int, Reserve]:
    """Return the bytes left for the KV cache, and what is kept for training.

    SGLang sizes the cache before the trainer is built, so where `memory_mb` does not say it, it is the arithmetic of
    `umbel.site.memory`. `cache` is SGLang's KVCacheConfigurator.
    """
    room = min(available_bytes, CPU_ROOM) if cache.device == "cpu" else available_bytes
    if settings is None:
        return room, Reserve()
    base = read_config(Path(cache.server_args.model_path))
    rank, modules, itemsize = settings.max_rank, settings.target_modules, cache.model_dtype.itemsize
    rung = None
    mb = settings.memory_mb
    if mb is None:
        training = Training(
            rank, modules, itemsize, settings.micro_batch, settings.seq_len, settings.adapters, cache.device == "cpu"
        )
        rung = choose_rung(base, training, room)
        mb = 0 if rung is None else -(-rung.bytes >> 20)
    left = max(0, room - (mb << 20))
    per_token = kv_bytes_per_token(base, cache.kv_cache_dtype.itemsize)
    held, without = (bytes_ // per_token for bytes_ in (left, room))
    if limit := cache.server_args.max_total_tokens:
        held, without = min(held, limit), min(without, limit)
    how = "as [training].memory_mb says" if settings.memory_mb is not None else "too little for any micro-batch"
    if rung is not None:
        how = f"micro-batches of {rung.rows}, activations {'computed again' if rung.recompute else 'kept'}"
    logger.info("%d MB kept for training (%s): %d tokens of KV cache, of %d", mb, how, without - held, without)
    return left, Reserve(mb, without - held)
