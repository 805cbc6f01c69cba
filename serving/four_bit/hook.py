"""`choose_loader`: the hook by which SGLang loads a base in 4 bits with umbel's loader, and any other with its own.

With SGLang's own `--load-format bitsandbytes` no LoRA adapter can be loaded, on any device. So that flag is as for
every base, and only the loader of the base's weights is another one.
"""

from collections.abc import Callable
from typing import Any

from serving.four_bit.library import bitsandbytes
from umbel.base.packed import METHOD


def choose_loader(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """Return the loader of a base in 4 bits, and SGLang's own for any other (AROUND `get_model_loader`)."""
    if getattr(model_config, "quantization", None) != METHOD:
        return original(load_config, model_config)
    bitsandbytes()  # before SGLang imports it in its own way
    from serving.four_bit.loader import FourBitLoader

    return FourBitLoader(load_config)
