"""`load`: the tokenizer of a model directory, held against the directory's weights; its chat template; its stop tokens.

A fault is blamed on the file that has it. An id that the embedding has no row for would end the engine on a GPU.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import serving.tokenizer
from client.data.chat_template import ChatTemplate
from client.data.examples import file_digest
from umbel.base.files import embedding_rows, json_object
from umbel.base.shapes import read_config
from umbel.errors import ConfigError

KNOWN_TEXT = "The 2 pumps, 7 °C: ok? Größe 10 – ja!\n"
"""Text that a whole tokenizer gives back, apart from case and from white space at its ends."""


def load(model: Path) -> Any:
    """Return the engine's tokenizer, a fast one; raise ConfigError where there is none, or one of another base."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        _json(model / name)
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ConfigError(f"{model}: there is no tokenizer.json; copy the whole model directory there")
    try:
        tokenizer = serving.tokenizer.load(model)
    except Exception as error:  # of the libraries that read its files, each with exceptions of its own
        raise ConfigError(
            f"{model}: its tokenizer cannot be loaded ({type(error).__name__}); is tokenizer.json there and whole?"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{model}: only a slow tokenizer; convert it, so that the directory has a tokenizer.json")
    _require_whole(tokenizer, model)
    _require_rows(tokenizer, model)
    return tokenizer


def digest(model: Path) -> str:
    """Return the sha256 of a tokenizer's files, which may have any name, without the weights. Raises DataError."""
    files = sorted((*model.glob("*"), *model.glob("additional_chat_templates/*")))
    parts = [(file.name, file_digest(file)) for file in files if file.suffix in (".json", ".jinja", ".model", ".txt")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _require_whole(tokenizer: Any, model: Path) -> None:
    """Raise ConfigError for a tokenizer that loses text, as one whose vocabulary was not copied does."""
    ids = tokenizer(KNOWN_TEXT, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if back.strip().casefold() != KNOWN_TEXT.strip().casefold():
        raise ConfigError(
            f"{model}/tokenizer.json: a text does not come back whole from its tokens ({len(ids)} for "
            f"{len(KNOWN_TEXT)} characters); the vocabulary is missing or another base's: copy the directory again"
        )


def _require_rows(tokenizer: Any, model: Path) -> None:
    """Raise ConfigError for tokens that the base has no embedding of."""
    rows = embedding_rows(model) or read_config(model).get("vocab_size")  # there may be no weights beside it
    most = max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])
    if isinstance(rows, int) and most >= rows:
        raise ConfigError(
            f"{model}: the tokenizer has ids up to {most}, the base {rows} rows of embeddings; tokenizer and weights "
            "belong to different bases: copy both from the same one"
        )


def template_of(tokenizer: Any, model: Path) -> ChatTemplate | None:
    """Return the chat template, or None for a base without one; raise ConfigError for one that cannot render."""
    if not tokenizer.chat_template:
        return None
    own = model / "chat_template.jinja"
    file = own if own.is_file() else model / "tokenizer_config.json"
    named = tokenizer.chat_template
    text = next(iter(named.values())) if isinstance(named, dict) else named  # of several, SGLang takes the first
    return ChatTemplate(text, tokenizer.special_tokens_map, file)


def stop_tokens(tokenizer: Any, model: Path) -> frozenset[int]:
    """Return the tokens at which SGLang ends an answer; an instruct model may have several."""
    found: set[int] = set()
    for file, key in ((model / "generation_config.json", "eos_token_id"), (model / "config.json", "eos_token_id")):
        ends = _json(file).get(key)
        found |= set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
    found |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())  # of SGLang's own list
    return frozenset(found | ({tokenizer.eos_token_id} - {None}))


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one where there is no file; raise ConfigError for anything else."""
    return json_object(file) if file.is_file() else {}
