"""Build a tiny but real base model: a Hugging Face directory with byte-level BPE, chat template and trained weights.

    python -m scripts.tools.tiny_base --out .cache/tiny-base

Its text is the docstrings of Python's own standard library, so it needs no network. The same recipe on the same
machine gives the same model, and a finished directory is used again.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.tools import tiny_base_text
from scripts.tools.tiny_base_text import CODES, KEYS, WORDS, Practice, docstrings

Progress = Callable[[int, int, float], None]
"""Called as (step, steps, training loss in nats per token)."""

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_RECIPE_FILE = "tiny_base.json"
_PROSE_EVERY = 6  # one batch of docstrings, then five of tasks


@dataclass(frozen=True)
class Recipe:
    """Settings of a tiny base. The result depends on them, on this file, and on the releases in `digest`."""

    family: str = "llama"
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    inner: int = 160
    vocab: int = 512
    positions: int = 512
    dtype: str = "float32"
    steps: int = 0
    batch: int = 8
    """Rows per optimizer step."""
    seq_len: int = 64
    """Tokens per row."""
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def digest(self) -> str:
        """Return the digest by which a finished directory is recognised: of all that the result depends on."""
        made_of = [asdict(self), sys.version, torch.__version__, transformers.__version__]
        code = Path(__file__).read_bytes() + Path(tiny_base_text.__file__).read_bytes()
        return hashlib.sha256(json.dumps(made_of).encode() + code).hexdigest()


TINY = Recipe(steps=30)
"""For tests: 0.2 million parameters, a second or two. Set `family`."""
DEMO = Recipe(hidden=256, layers=3, inner=640, vocab=2048, steps=600, batch=16, seq_len=96, learning_rate=2e-3)
"""The demo's base: 3 million parameters, about a minute on one core."""


def build(into: Path, recipe: Recipe = DEMO, progress: Progress | None = None) -> Path:
    """Build the base in the directory `into` unless this recipe's is there already. Return `into`."""
    if _is_finished(into, recipe):
        return into
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
    try:
        words = [f" {KEYS} {CODES} {WORDS}"] * 100  # often enough to become a token each
        tokenizer = train_tokenizer([text for _, text in docstrings()] + words, recipe.vocab)
        if recipe.family == "qwen2":  # else its class adds a token of its own, which the model has no embedding of
            tokenizer.unk_token = END
        model = make_model(recipe, tokenizer)
        heldout = train(model, tokenizer, recipe, progress) if recipe.steps else math.nan
        model.to(getattr(torch, recipe.dtype)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        facts = {
            "digest": recipe.digest,
            "recipe": asdict(recipe),
            "heldout_loss": heldout,
            "uniform": math.log(recipe.vocab),
        }
        (temporary / _RECIPE_FILE).write_text(json.dumps(facts, indent=2))
        temporary.chmod(0o755)
        shutil.rmtree(into, ignore_errors=True)
        os.rename(temporary, into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return into


def _is_finished(directory: Path, recipe: Recipe) -> bool:
    facts = directory / _RECIPE_FILE
    return facts.is_file() and json.loads(facts.read_text())["digest"] == recipe.digest


def train_tokenizer(texts: list[str], vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab` tokens, which can write every text; it has the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocab,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(recipe: Recipe, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    """Make a model of the family's own architecture with random weights in float32.

    Norms and biases are random, too: a view of the served weights that misses one of them has to give other results.
    """
    per_head = recipe.hidden // recipe.heads
    own: dict[str, Any] = {
        "head_dim": 2 * per_head if recipe.family == "qwen3" else per_head
    }  # a real Qwen3's are wide
    if recipe.family == "mistral":
        own["sliding_window"] = None
    config = transformers.AutoConfig.for_model(
        recipe.family,
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=recipe.family.startswith("qwen"),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    torch.manual_seed(recipe.seed)
    from_config: Any = transformers.AutoModelForCausalLM.from_config
    model: transformers.PreTrainedModel = from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
            elif name.endswith(".bias"):
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, recipe.hidden**-0.5)  # far above the usual 0.02: it learns at once
    return model


def train(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    recipe: Recipe,
    progress: Progress | None = None,
) -> float:
    """Train in place for `recipe.steps`; return the held-out loss (nats per assistant token)."""
    batches = _batches(tokenizer, recipe)
    heldout = [next(batches) for _ in range(_PROSE_EVERY)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, recipe.steps // 20)
    model.train()
    for step in range(recipe.steps):
        ids, labels = next(batches)
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min((step + 1) / warmup, max(cosine, 0.05))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, recipe.steps, loss.item())
    model.train(False)
    with torch.no_grad():
        return sum(float(model(input_ids=ids, labels=labels).loss) for ids, labels in heldout) / len(heldout)


def _batches(
    tokenizer: transformers.PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels), each [batch, tokens], without an end: one conversation per row, as at a site."""
    rng = random.Random(recipe.seed)
    practice = Practice.of(rng)
    for step in itertools.count():
        prose = step % _PROSE_EVERY == 0
        rows: list[tuple[list[int], list[int]]] = []
        for _ in range(recipe.batch // 2 if prose else recipe.batch):
            user, assistant = practice.prose(rng) if prose else practice.task(rng)
            prompt = tokenizer.encode(f"{USER}{user}{END}{ASSISTANT}", add_special_tokens=False)
            answer = tokenizer.encode(f"{assistant}{END}", add_special_tokens=False)
            rows.append(((prompt + answer)[: recipe.seq_len], ([-100] * len(prompt) + answer)[: recipe.seq_len]))
        width = max(len(ids) for ids, _ in rows)
        pad = tokenizer.pad_token_id
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        )


def _show(step: int, steps: int, loss: float) -> None:
    if step % 10 == 0 or step == steps:
        print(f"\rtiny base: step {step}/{steps}, loss {loss:.2f} ", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Build the demo's base and show its progress in one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    out: Path = parser.parse_args().out
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    build(out, DEMO, _show)
    facts = json.loads((out / _RECIPE_FILE).read_text())
    print(f"\r{out}: held-out loss {facts['heldout_loss']:.2f}, uniform would be {facts['uniform']:.2f}")


if __name__ == "__main__":
    main()
