"""`CheckedSite`: the engine that is checked, with its co-trainer, over one base; no daemon and no centre."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from scripts.tools.processes import free_port
from scripts.tools.trial_site import RANK, random_adapter
from serving.aliases import AliasTable
from serving.cotrainer.lanes.lagging import VARIABLE as LAG
from serving.engine import Engine
from serving.trainer_socket import CoTrainerClient, CoTrainerSettings, CoTrainerStatus, TrainJob, socket_path
from umbel import peft_dir, token_file
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.shapes import LINEARS, read_config
from umbel.errors import ConfigError, TrainingError
from umbel.messages import TrainPlan
from umbel.site.config import SiteConfig
from umbel.site.template import Tables, site_toml

VERSION = AdapterRef("support", 1)
SEQ_LEN, MICRO_BATCH, ROWS = 64, 4, 64
B_STD = 0.1
"""Standard deviation of the factor B of the adapter that is loaded: enough to change answers."""
POLL_S = 0.05
JOB_S = 300.0
"""Longest wait for the end of a job."""
BASE = "checked"
"""Name of the base in the engine."""


@dataclass(frozen=True)
class Device:
    """The device that is checked."""

    kind: str
    """`cuda`, or `cpu`."""
    dtype: str
    lag: str | None
    """Factor of the lagging device (see `serving.cotrainer.lanes.lagging`); None without one."""

    @classmethod
    def find(cls, wanted: str, dtype: str | None) -> "Device":
        """Return the device of this machine; `any` takes the CPU where there is no GPU.

        Raises ConfigError where `cuda` is wanted and neither a GPU nor a lagging device is there.
        """
        import torch

        lag = os.environ.get(LAG)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and kind == "cpu" and lag is None:
            raise ConfigError(f"torch finds no GPU; run with --device any, or with {LAG}=1.5 for a CPU that lags")
        return cls(kind, dtype or ("bfloat16" if kind == "cuda" else "float32"), lag)


class CheckedSite:
    """A running engine, the data of its jobs, and the adapter that is loaded; `start` it, `stop` it."""

    def __init__(self, folder: Path, model: Path, device: Device) -> None:
        self.folder, self.model, self.device = folder, model, device
        tables: Tables = {
            "model": {"served_name": BASE},
            "engine": {"dtype": device.dtype, "max_lora_rank": RANK},
            "engine.extra_args": {"max_running_requests": 16},
            "training": {"micro_batch": MICRO_BATCH, "seq_len": SEQ_LEN},
        }
        (folder / "site.toml").write_text(site_toml(tables, name="gpu-check", model=model, port=free_port()))
        self.config = SiteConfig.load(folder / "site.toml")
        self.state_dir = self.config.site.state_dir
        self.state_dir.mkdir()
        CoTrainerSettings.of(self.config).write(self.state_dir)
        self.engine = Engine(self.config)
        self.trainer = CoTrainerClient(socket_path(self.state_dir))
        self.adapter = self.state_dir / "adapters" / VERSION.engine_name
        self.vocabulary = int(read_config(model)["vocab_size"])

    async def start(self) -> CoTrainerStatus:
        """Start the engine; return its co-trainer's status once the engine's own latency is known.

        Raises EngineError if the engine does not start, TrainingError if it cannot train.
        """
        self._write_files()
        await self.engine.start(AliasTable(base=BASE, adapters={VERSION.name: {"live": None}}), {})
        status = await self.trainer.status()
        if status.error:
            raise TrainingError(f"the engine cannot train: {status.error}; see {self.engine.log}")
        await self.engine.client.measure()
        return await self.trainer.status()

    async def stop(self) -> None:
        await self.engine.stop(drain_s=0)

    async def generate(self, prompts: list[list[int]], tokens: int, adapter: str | None = None) -> list[list[int]]:
        """Return the ids that the engine generates greedily for each prompt, as the operator asks it."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        bodies: list[dict[str, Any]] = [{"input_ids": prompt, "sampling_params": sampling} for prompt in prompts]
        for body in bodies if adapter else ():
            body["lora_path"] = adapter
        asked = [self.engine.client.ask("POST", "/generate", json=body) for body in bodies]
        replies = await asyncio.gather(*asked)
        return [reply.raise_for_status().json()["output_ids"] for reply in replies]

    def job(self, name: str, steps: int) -> TrainJob:
        """Return a job of so many optimizer steps."""
        plan = TrainPlan(rank=RANK, steps=steps, seconds=1e6, batch_size=2 * MICRO_BATCH)
        parent, output = self.folder / "parent.safetensors", self.folder / f"{name}.safetensors"
        return TrainJob(id=name, plan=plan, parent=str(parent), data=str(self.folder / "data.npy"), output=str(output))

    async def ended(self, job: TrainJob) -> CoTrainerStatus:
        """Wait for a job's end; return the status then. Raises TrainingError after JOB_S."""
        try:
            async with asyncio.timeout(JOB_S):
                while not (status := await self.trainer.status()).state.final or status.job != job.id:
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise TrainingError(f"{job.id}: {status.state}, {status.steps} steps after {JOB_S:.0f} s") from error
        return status

    def _write_files(self) -> None:
        draw = np.random.default_rng(0)
        rows = draw.integers(0, self.vocabulary, (ROWS, SEQ_LEN)).tolist()
        token_file.write(self.folder / "data.npy", [(row, row) for row in rows], seq_len=SEQ_LEN, pad_id=0)
        (self.folder / "parent.safetensors").write_bytes(random_adapter(self.model, seed=7, b_std=0.0))
        dtype = ml_dtypes.bfloat16 if self.device.dtype == "bfloat16" else np.float32
        blob = random_adapter(self.model, seed=1, b_std=B_STD, dtype=dtype)
        manifest = AdapterManifest(
            name=VERSION.name, version=VERSION.version, digest=peft_dir.digest(blob), lineage="gpu-check", round=1,
            base=BaseFingerprint.of(self.model).digest, rank=RANK, target_modules=LINEARS,
        )  # fmt: skip
        self.adapter.parent.mkdir(parents=True)
        peft_dir.write(self.adapter, blob, manifest, base=str(self.model))
