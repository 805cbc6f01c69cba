"""Runs a site without an engine: daemon, control API, journal, deployer and co-trainer are real; it serves no users.

    python tests/toys/sites/plain_site.py site.toml --fault nan@1 --fault late@2

In place of SGLang there is a Hugging Face model, and a thread that runs the co-trainer as an idle engine would.
A fault strikes in one round: `nan` and `flip` spoil what was trained, `late` does not train before there is a file `go`
in the state directory, `die` ends the daemon as kill -9 would.
"""

import argparse
import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import zmq
from transformers import AutoModelForCausalLM

from client import daemon, site, tenant
from client.data.prepare import Prepared
from client.rounds.jobs import Jobs
from serving.cotrainer.cotrainer import CoTrainer
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from serving.trainer_socket import CoTrainerSettings, CoTrainerStatus
from tests.toys.sites.no_engine import NoEngine
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.messages import JobState, RoundOrder, RoundReport
from umbel.site.config import SiteConfig

IDLE_MS = 50

T = TypeVar("T")


class PlainSupervisor:
    """Stands in for `serving.supervisor.Supervisor`: holds the model, and trains whenever there is a job."""

    def __init__(self, config: SiteConfig, cotrainer: object, what_to_serve: object) -> None:
        self._config = config
        self._ready = asyncio.Event()
        self._stopped = threading.Event()
        self.loaded: set[AdapterRef] = set()
        self.starts = 1
        self.deaths_under_users = 0
        self.longest_hang_s = 60.0
        self.started_at = 0.0

    @property
    def engine(self) -> NoEngine | None:
        return NoEngine() if self._ready.is_set() else None

    async def ready(self) -> NoEngine:
        await self._ready.wait()
        return NoEngine()

    async def while_running(self, work: Coroutine[Any, Any, T]) -> T:
        return await work

    async def run(self) -> None:
        cotrainer = await asyncio.to_thread(self._build)
        threading.Thread(target=self._train, args=(cotrainer,), daemon=True).start()
        self._ready.set()
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self._stopped.set()

    def _build(self) -> CoTrainer:
        settings = CoTrainerSettings.read(self._config.site.state_dir)
        assert settings is not None
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(self._config.model.path, dtype=torch.float32).eval()
        cotrainer = CoTrainer(settings, self._config.site.state_dir)
        cotrainer.trainer = LoraTrainer(
            model, max_rank=settings.max_rank, target_modules=settings.target_modules,
            seq_len=settings.seq_len, pieces=Pieces.whole(settings.micro_batch, settings.seq_len),
        )  # fmt: skip
        cotrainer.idle_poller = zmq.Poller()
        cotrainer.idle_poller.register(cotrainer.commands.socket, zmq.POLLIN)
        return cotrainer

    def _train(self, cotrainer: CoTrainer) -> None:
        while not self._stopped.is_set():
            if not cotrainer.instead_of_sleep():
                cotrainer.idle_poller.poll(IDLE_MS)


def faulty(faults: dict[int, str]) -> type[Jobs]:
    """Jobs that go wrong in the rounds that `faults` names."""

    class FaultyJobs(Jobs):
        async def _train(self, order: RoundOrder) -> None:
            fault = faults.get(order.round)
            while fault == "late" and not (self._directory.parent.parent / "go").exists():
                await asyncio.sleep(0.2)
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            await super()._train(order)

        def _conclude(self, order: RoundOrder, status: CoTrainerStatus, data: Prepared) -> RoundReport:
            report, fault = super()._conclude(order, status, data), faults.get(order.round)
            if report.state is not JobState.DONE or fault not in ("nan", "flip"):
                return report
            file = self._folder(order.key).update
            spoiled = peft_dir.encode(spoil(peft_dir.decode(file.read_bytes()), fault))
            file.write_bytes(spoiled)
            return report.model_copy(update={"update": peft_dir.digest(spoiled)})

    return FaultyJobs


def spoil(tensors: peft_dir.Tensors, fault: str) -> peft_dir.Tensors:
    """Spoil an update so that it must not get through: no numbers, or the opposite of the training."""
    factor = np.float32("nan") if fault == "nan" else np.float32(-1)
    return {name: array * (factor if ".lora_B." in name else np.float32(1)) for name, array in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--fault", action="append", default=[], help="KIND@ROUND")
    options = parser.parse_args()
    faults = {int(number): kind for kind, _, number in (fault.partition("@") for fault in options.fault)}
    for module, name, replacement in ((site, "Supervisor", PlainSupervisor), (tenant, "Jobs", faulty(faults))):
        setattr(module, name, replacement)
    asyncio.run(daemon.serve(SiteConfig.load(options.site)))


if __name__ == "__main__":
    main()
