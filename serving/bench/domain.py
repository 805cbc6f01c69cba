"""`build`: the benchmark's own base, trained on one Markov grammar, and data of another grammar to adapt to.

A grammar gives each symbol four successors with fixed odds. The loss of a model that knows the grammar is its entropy,
1.1 nats, and never zero, so 1 / loss stays meaningful. In the second grammar half of the symbols have other successors.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.bench.world import END, FIRST_SYMBOL, HELDOUT_ROWS, PAD, SEQ_LEN, SYMBOLS, World
from umbel import token_file

FORMAT = 1
"""Part of the cache key. Raise it when the same recipe shall give another world."""
ODDS = (0.6, 0.2, 0.1, 0.1)
"""Probabilities of a symbol's four successors."""
TRAIN_ROWS = 2048
Ints = npt.NDArray[np.int64]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Sizes of the base: small enough for one core, slow enough that HTTP does not dominate the measured times."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    inner: int = 640
    symbols: int = SYMBOLS
    positions: int = 512
    steps: int = 300
    batch: int = 16
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def digest(self) -> str:
        """Return the cache key."""
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)]).encode()).hexdigest()[:16]


def successors(recipe: Recipe, changed: bool) -> Ints:
    """Return each symbol's successors, [symbols, 4], in the base's grammar or (`changed`) in the one to adapt to."""
    rng = np.random.default_rng(recipe.seed)
    table = rng.integers(0, recipe.symbols, (2, recipe.symbols, len(ODDS)))
    kept = np.arange(recipe.symbols)[:, None] % 2 == 0
    result: Ints = np.where(kept, table[0], table[1]) if changed else table[0]
    return result


def walk(table: Ints, rows: int, tokens: int, rng: np.random.Generator) -> Ints:
    """Return token ids of random walks through a grammar, [rows, tokens]."""
    symbols = np.empty((rows, tokens), dtype=np.int64)
    symbols[:, 0] = rng.integers(0, len(table), rows)
    for t in range(1, tokens):
        symbols[:, t] = table[symbols[:, t - 1], rng.choice(len(ODDS), rows, p=ODDS)]
    return symbols + FIRST_SYMBOL


def build(cache: Path, recipe: Recipe, progress: Progress = print) -> World:
    """Make the world of a recipe in `cache` if it is not there yet; that takes about a minute on one core."""
    folder = cache / f"bench-{recipe.digest}"
    if folder.is_dir():
        return World.at(folder)
    progress(f"training the benchmark's base in {folder}; this is done once")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".bench-", dir=cache))
    try:
        world = World.at(temporary)
        _make_base(recipe, world.model, progress)
        _make_data(recipe, world)
        world.make_initial()
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return World.at(folder)


def _make_data(recipe: Recipe, world: World) -> None:
    rng = np.random.default_rng(recipe.seed + 1)
    table = successors(recipe, changed=True)
    for path, rows in ((world.train, TRAIN_ROWS), (world.heldout, HELDOUT_ROWS)):
        ids = walk(table, rows, SEQ_LEN, rng).tolist()
        token_file.write(path, [(row, row) for row in ids], seq_len=SEQ_LEN, pad_id=PAD)


def _make_base(recipe: Recipe, into: Path, progress: Progress) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    tokenizer = _tokenizer(recipe)
    from_config: Any = transformers.AutoModelForCausalLM.from_config
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.positions, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    model = from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0.0, recipe.hidden**-0.5)  # far above the usual 0.02: it learns at once
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    rng, table = np.random.default_rng(recipe.seed + 2), successors(recipe, changed=False)
    for step in range(recipe.steps):
        ids = torch.as_tensor(walk(table, recipe.batch, SEQ_LEN, rng))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 20, 2 * (1 - step / recipe.steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            progress(f"  step {step + 1} of {recipe.steps}: loss {loss.item():.2f}")
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _tokenizer(recipe: Recipe) -> Any:
    """Return a tokenizer with a word per symbol; detokenizing takes little time beside an iteration."""
    import tokenizers
    import transformers

    words = {"<pad>": PAD, "<end>": END, **{f"s{n}": FIRST_SYMBOL + n for n in range(recipe.symbols)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))  # noqa: S106
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)  # type: ignore[no-untyped-call]
