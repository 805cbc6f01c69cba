"""`World`: a base, and data to adapt it to: the benchmark's own (see `domain`), or those of a site."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from serving.bench.trace import CORE
from serving.cotrainer.slo import Slo
from umbel import peft_dir, token_file
from umbel.base.shapes import LINEARS, linear_shapes, read_config
from umbel.errors import ConfigError, DataError
from umbel.site.config import SiteConfig
from umbel.site.template import Tables

PAD, END = 0, 1
FIRST_SYMBOL, SYMBOLS = 2, 512
HELDOUT_ROWS = 48
RANK = 8
"""Rank of the adapters; less where a site serves no such rank."""
SEQ_LEN = 64
MICRO_BATCH = 8
MAX_RUNNING = 8
PLUGINS = {"SGLANG_PLUGINS": "umbel_bench,umbel_cpu"}
LEARNING_RATE, USUAL_RATE = 6e-3, 2e-3
"""Learning rates: of the benchmark's tiny base, and the usual one of a run, for the base of a site."""


ENGINE_KEYS = {"device", "dtype", "max_lora_rank", "target_modules", "slots"}
TRAINING_KEYS = {"seq_len", "micro_batch", "memory_mb"}
"""Keys of a site that its engine has in the benchmark, too; targets and shares are those of the compared systems."""


def _own_tables() -> Tables:
    return {
        "engine": {"dtype": "float32", "max_lora_rank": RANK},
        "engine.extra_args": {"max_total_tokens": 20000, "max_running_requests": MAX_RUNNING},
        "engine.env": PLUGINS,
        "training": {"micro_batch": MICRO_BATCH, "seq_len": SEQ_LEN},
    }


@dataclass(frozen=True)
class World:
    """Files of a base and of its data, and how they are served and trained on."""

    model: Path
    train: Path
    """Token file."""
    heldout: Path
    """Token file."""
    initial: Path
    """A PEFT directory whose B is zero: it answers as the base does, at an adapter's price."""
    rank: int = RANK
    target_modules: tuple[str, ...] = LINEARS
    micro_batch: int = MICRO_BATCH
    learning_rate: float = LEARNING_RATE
    dtype: str = "float32"
    prompt_ids: range = range(FIRST_SYMBOL, FIRST_SYMBOL + SYMBOLS)
    """Token ids of which prompts are drawn."""
    site: str = ""
    """Name of the site whose base and data these are; empty for the benchmark's own."""
    slo: Slo | None = None
    """Targets of the site; None: strict ones, from what the engine needs by itself."""
    tables: Tables = field(default_factory=_own_tables)
    """Settings of the engine's site file."""

    @classmethod
    def at(cls, folder: Path) -> "World":
        """Return the benchmark's own world in a folder; the files need not exist."""
        return cls(folder / "model", folder / "train.npy", folder / "heldout.npy", folder / "initial")

    @classmethod
    def of_site(cls, config: SiteConfig, train: Path, heldout: Path, into: Path) -> "World":
        """Return a site's base and data; `train` and `heldout` are its token files. What is made goes into `into`.

        Raises ConfigError for a base that cannot take the requests, DataError without held-out examples.
        """
        _require_room(config)
        engine, slo, training = config.engine, config.slo, config.training
        targets = None
        if slo.ttft_ms is not None and slo.tpot_ms is not None:
            targets = Slo(slo.ttft_ms / 1e3, slo.tpot_ms / 1e3, slo.quantile, slo.batch_factor)
        world = cls(
            config.model.path, train, into / "heldout.npy", into / "initial",
            rank=min(RANK, engine.max_lora_rank),
            target_modules=engine.target_modules,
            micro_batch=training.micro_batch,
            learning_rate=USUAL_RATE,
            dtype=engine.dtype,
            prompt_ids=range(read_config(config.model.path)["vocab_size"]),
            site=config.site.name,
            slo=targets,
            tables={
                "engine": engine.model_dump(mode="json", include=ENGINE_KEYS, exclude_none=True),
                "engine.extra_args": engine.extra_args,
                # All share one core: more threads than one would stand in each other's way.
                "engine.env": {**engine.env, "OMP_NUM_THREADS": "1", **PLUGINS},
                "training": training.model_dump(include=TRAINING_KEYS, exclude_none=True),
            },
        )  # fmt: skip
        into.mkdir(parents=True, exist_ok=True)
        _keep_rows(heldout, world.heldout, HELDOUT_ROWS)
        shutil.rmtree(world.initial, ignore_errors=True)
        world.make_initial()
        return world

    @property
    def tokens_per_row(self) -> float:
        """Return the mean number of tokens of an example of the training data."""
        return float(token_file.TokenFile.open(self.train).lengths.mean())

    def prepare_version(self, directory: Path) -> Path:
        """Make a PEFT directory without its weights; return the path at which they are expected."""
        directory.mkdir(parents=True)
        config = peft_dir.peft_config(rank=self.rank, target_modules=self.target_modules, base="bench")
        (directory / peft_dir.CONFIG).write_text(json.dumps(config))
        return directory / peft_dir.WEIGHTS

    def make_initial(self) -> None:
        """Write the initial adapter: A is random, B is zero."""
        rng = np.random.default_rng(0)
        tensors: peft_dir.Tensors = {}
        for module, (outer, inner) in linear_shapes(self.model, self.target_modules).items():
            a = rng.standard_normal((self.rank, inner)) * inner**-0.5
            tensors[peft_dir.key(module, "A")] = a.astype(np.float32)
            tensors[peft_dir.key(module, "B")] = np.zeros((outer, self.rank), np.float32)
        self.prepare_version(self.initial).write_bytes(peft_dir.encode(tensors))


def _require_room(config: SiteConfig) -> None:
    """Raise ConfigError if the base's texts are shorter than the longest request with its answer."""
    asked = {name.lstrip("-").replace("-", "_"): value for name, value in config.engine.extra_args.items()}
    longest, needed = asked.get("context_length"), CORE.prompt + CORE.output
    longest = longest or read_config(config.model.path).get("max_position_embeddings") or needed
    if longest < needed:
        raise ConfigError(
            f"{config.model.path}: the base takes texts of {longest} tokens, and the requests of the benchmark have up "
            f"to {needed}; take a base with a longer context, or raise context_length in [engine.extra_args]"
        )


def _keep_rows(source: Path, into: Path, most: int) -> None:
    """Write the first rows of a token file into another one. Raises DataError if there are none."""
    rows = token_file.TokenFile.open(source)
    if not len(rows):
        raise DataError(
            "no example is held out, and versions are compared on those; give [training].eval_data, or more data"
        )
    kept = [
        (rows.ids[n, :length].tolist(), rows.labels[n, :length].tolist())
        for n, length in enumerate(rows.lengths[:most])
    ]
    token_file.write(into, kept, seq_len=rows.ids.shape[1], pad_id=PAD)
