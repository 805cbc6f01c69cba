"""`Pin`: the base model, layers, dtype and rank that all versions of an adapter have in common."""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from umbel import peft_dir
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import Kin, kin_of
from umbel.errors import AdapterError, ConfigError
from umbel.messages import Hello
from umbel.peft_dir import Tensors

MIX_THEM = "run with mixed-bases=true to train them together, at the price that docs/how-to/choose-a-base.md gives"
SIGN_IT = "copy origin.json of the centre's pack there, which `umbel base pack --signing-key` signs"


class Pin(BaseModel):
    """Adopted from the first quorum of sites (trust on first use); every later site has to match it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: BaseFingerprint
    kin: Kin = ""
    """Kin of a packed base, as its site said it; a dense one has it by its fingerprint."""
    shapes: dict[str, tuple[int, int]]
    """Module path → (out, in)."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """What every site serves in. Versions are kept and sent in float32, and a site rounds those that it loads."""
    rank: PositiveInt

    @classmethod
    def of(cls, hello: Hello, rank: int) -> "Pin":
        """Return the pin that a site's hello describes."""
        kin = "" if hello.fingerprint.dense else hello.kin
        return cls(fingerprint=hello.fingerprint, kin=kin, shapes=hello.shapes, dtype=hello.dtype, rank=rank)

    @property
    def target_modules(self) -> tuple[str, ...]:
        return tuple(sorted({module.rsplit(".", 1)[-1] for module in self.shapes}))

    @property
    def shared(self) -> str:
        """Return the kin of the base; empty where no other base is known to be kin to it."""
        return kin_of(self.fingerprint, self.kin)

    def require(self, hello: Hello, adapter: str, *, mixed_bases: bool = False) -> None:
        """Raise BaseMismatch, AdapterError or ConfigError, naming the difference, unless the site can take part."""
        if hello.adapter != adapter:
            raise ConfigError(
                f"site {hello.site} does not train an adapter {adapter!r}; give `adapter` in the run configuration the "
                "name that the sites' [[adapter]] tables have, or add such a table there"
            )
        self.require_base(hello, here="this registry", mixed_bases=mixed_bases)
        if hello.shapes != self.shapes:
            differing = sorted(set(hello.shapes.items()) ^ set(self.shapes.items()))[0][0]
            raise AdapterError(
                f"site {hello.site} adapts other layers than this registry ({differing} differs); "
                "give every site the same [engine].target_modules"
            )
        if hello.dtype != self.dtype:
            raise AdapterError(
                f"site {hello.site} serves in {hello.dtype}, this registry's sites in {self.dtype}; "
                "give every site the same [engine].dtype"
            )

    def require_base(self, hello: Hello, *, here: str, mixed_bases: bool) -> None:
        """Raise BaseMismatch unless the site holds this base or, in a run with `mixed_bases`, one that is kin to it.

        `here` names where this pin is from.
        """
        kin = self.shared != "" and kin_of(hello.fingerprint, hello.kin) == self.shared
        if kin and mixed_bases:
            return
        remedy = "copy the same model directory to both"
        if kin:
            remedy = f"they are kin: {MIX_THEM}"
        elif mixed_bases and hello.packing and not hello.kin:
            remedy = f"it is packed, and says no origin that is trusted there: {SIGN_IT}"
        self.fingerprint.require_same(hello.fingerprint, here=here, there=f"site {hello.site}", remedy=remedy)

    def require_rank(self, hello: Hello, *, mixed: bool = False, own: int = 0) -> None:
        """Raise AdapterError unless the site can train and serve the whole rank; with `mixed`, any smaller rank.

        `own`: rank of the adapter that stays at the site, which takes from the site's largest rank.
        """
        needed = (1 if mixed else self.rank) + own
        if hello.max_lora_rank >= needed:
            return
        takes, instead = "", f"rank={hello.max_lora_rank} or with strategy='exact', which takes in smaller ranks"
        if own:
            takes, instead = f", {own} of them for the adapter that stays there", "a smaller personal-rank"
        raise AdapterError(
            f"site {hello.site} serves adapters up to rank {hello.max_lora_rank}, this run needs {needed}{takes}; "
            f"raise [engine].max_lora_rank there and restart it, or run with {instead}"
        )

    def initial(self, seed: int) -> Tensors:
        """Return the untrained adapter of this base and rank, in float32; it changes nothing, for its B is zero."""
        generator = np.random.default_rng(seed)
        tensors: Tensors = {}
        for module in sorted(self.shapes):
            tensors |= peft_dir.untrained(module, self.shapes[module], self.rank, np.float32, generator)
        return tensors
