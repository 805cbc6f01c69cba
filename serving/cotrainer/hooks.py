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
from serving.trainer_socket import CoTrainerSettings

logger = logging.getLogger(__name__)


class Hooks:
    """Four moments of the scheduler. Without `trainer.json` in the run directory the engine only serves."""

    def __init__(self, run_dir: Path, cotrainer_type: type[CoTrainer] = CoTrainer) -> None:
        self.run_dir = run_dir
        self.cotrainer_type = cotrainer_type
        self.cotrainer: CoTrainer | None = None
        self._state = engine_state.opened(run_dir)
        self._logged = ""

    def after_init(self, result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AFTER `Scheduler.__init__`: build and calibrate the trainer, before the engine reports ready."""
        try:
            settings = CoTrainerSettings.read(self.run_dir)
            if settings is None:
                return
            cotrainer = self.cotrainer_type(settings, self.run_dir)
            scheduler.idle_sleeper.poller.register(cotrainer.commands.socket, zmq.POLLIN)
            cotrainer.idle_poller = scheduler.idle_sleeper.poller
            self.cotrainer = cotrainer
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


def reserve_memory(available_bytes: int, run_dir: Path) -> int:
    """Return the bytes left for the KV cache once `memory_mb` is kept for the trainer.

    SGLang sizes the cache before the trainer is built.
    """
    settings = CoTrainerSettings.read(run_dir)
    if settings is None or settings.memory_mb is None:
        return available_bytes
    return max(available_bytes - (settings.memory_mb << 20), 0)
