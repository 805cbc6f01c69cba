"""peft's LoRA layer and its settings, imported without bitsandbytes.

peft imports bitsandbytes wherever it is installed: seconds at each start of a site, and a look-up in the network. Its
layers for bitsandbytes' own `Linear4bit` are not needed, also over a base in 4 bits: see `FourBitLinear`.
"""

from serving.four_bit.library import absent
from umbel.base.packed import METHOD

with absent(METHOD):
    from peft.tuners.lora import Linear, LoraConfig, LoraLayer

__all__ = ("Linear", "LoraConfig", "LoraLayer")
