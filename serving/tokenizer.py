"""`load`: the tokenizer of a model directory as the engine has it, by SGLang's own loader.

`transformers` alone gives other tokens for some bases: where tokenizer_config.json names a class that rebuilds parts of
tokenizer.json (Mistral's, the R1 distillates'), SGLang puts them back, and so do the tokens before a plain prompt.
"""

from pathlib import Path
from typing import Any


def load(model: Path) -> Any:
    """Return the tokenizer; raises whatever SGLang, `transformers` and `tokenizers` raise for files they cannot use."""
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer  # seconds to import

    return get_tokenizer(str(model), local_files_only=True)
