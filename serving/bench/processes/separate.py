"""`python -m serving.bench.processes.separate RUN_DIR MODEL CORE DTYPE`: a trainer in a process of its own.

It has a copy of the base. It is umbel's trainer and speaks umbel's protocol on RUN_DIR's socket, but there is no
engine: the operating system decides when it runs.
"""

import os
import sys
from pathlib import Path

import torch
import zmq
from transformers import AutoModelForCausalLM

from serving.bench.baselines import Unpaced
from serving.bench.systems import whole
from serving.cotrainer.cotrainer import CoTrainer
from serving.cotrainer.trainer import LoraTrainer
from serving.launch import die_with_parent
from serving.trainer_socket import CoTrainerSettings
from umbel.errors import TrainingError


def cotrainer(run_dir: Path, model: Path, dtype: str = "float32") -> CoTrainer:
    """Make a co-trainer without an engine: it is always idle, and never rests.

    Raises TrainingError if RUN_DIR has no settings.
    """
    settings = CoTrainerSettings.read(run_dir)
    if settings is None:
        raise TrainingError(f"{run_dir}: no trainer.json here; whoever starts this process writes it first")
    made = CoTrainer(settings, run_dir)
    made.governor = Unpaced()
    made.idle_poller = zmq.Poller()
    made.idle_poller.register(made.commands.socket, zmq.POLLIN)
    made.trainer = LoraTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
        max_rank=settings.max_rank,
        target_modules=settings.target_modules,
        seq_len=settings.seq_len,
        pieces=whole(settings.micro_batch, settings.seq_len),
    )
    made.unavailable = ""
    return made


def main() -> None:
    """Train whatever the benchmark asks for, until the process is killed."""
    die_with_parent()
    os.sched_setaffinity(0, {int(sys.argv[3])})
    torch.set_num_threads(1)
    trainer = cotrainer(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4])
    while True:
        if not trainer.instead_of_sleep():
            trainer.idle_poller.poll()


if __name__ == "__main__":
    main()
