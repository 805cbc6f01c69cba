"""`PersonalPart`: the part of an adapter that stays at its site, joined to the shared part to be trained and served.

    received ──join──► trained, served ──split──► sent to the centre, kept here

The personal part is either B (FedSA-LoRA, arXiv 2410.01463), or a whole adapter P beside the shared adapter G (dual
adapters, as in FedDPA, arXiv 2403.19211, and FDLoRA, arXiv 2406.07925). All adapters are canonical (alpha == r), so
adapters side by side are their sum: [B_G | B_P] [A_G; A_P] = B_G A_G + B_P A_P. Shapes: A [rank, in], B [out, rank].
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from umbel import peft_dir
from umbel.adapter import AdapterManifest, Personal
from umbel.errors import AdapterError
from umbel.peft_dir import Tensors
from umbel.site.config import SiteConfig


class PersonalPart:
    """The site's own part of one adapter, kept between rounds in `<state_dir>/personal/<adapter>`.

    There is one file per lineage, kind, rank, dtype of the engine and set of layers: after a change of any of them the
    site begins with a new part, and finds the old one again when the change is undone. The files never leave this
    machine.

    >>> part = PersonalPart(config, "support", manifest.lineage, manifest.personal)
    >>> tensors = part.begin(received, seed=7)
    """

    def __init__(self, config: SiteConfig, adapter: str, lineage: str, personal: Personal) -> None:
        self._config = config
        self._adapter = adapter
        self._limit = "[[adapter]].rank" if config.section(adapter).rank else "[engine].max_lora_rank"
        self._folder = config.site.state_dir / "personal" / adapter
        self._lineage = lineage
        self._personal = personal

    def begin(self, received: Tensors, seed: int) -> Tensors:
        """Return the tensors that a round trains: `received` joined to this site's part.

        The first part of a site is drawn by `seed` and the site's name. Raises AdapterError when the joined rank is
        over the engine's, or the part is damaged.
        """
        own = self.read(received)
        if own is None:
            own = first(received, self._personal, f"{seed} {self._config.site.name}")
        return join(received, own, self._personal)

    def read(self, received: Tensors) -> Tensors | None:
        """Return this site's part that fits `received`; None before the first round. Raises AdapterError as `begin`."""
        rank, most = _rank(received), self._config.max_rank(self._adapter)
        if rank + self._personal.rank > most:
            raise AdapterError(
                f"adapter: rank {rank} and this site's own part of rank {self._personal.rank} are joined to one of "
                f"rank {rank + self._personal.rank}, over {self._limit} = {most}; raise it here and restart, "
                "or lower rank or personal-rank of the run"
            )
        file = self._file(received)
        if not file.exists():
            return None
        try:
            return peft_dir.decode(file.read_bytes())
        except AdapterError as error:
            raise AdapterError(
                f"{file}: this site's own part is damaged ({error}); restore it from your backup, or remove it: the "
                "site then begins anew"
            ) from error

    def keep(self, received: Tensors, own: bytes) -> None:
        """Store `own`, encoded from the second result of `split`, as this site's part; it is on disk on return."""
        file = self._file(received)
        file.parent.mkdir(parents=True, exist_ok=True)
        peft_dir.replace_durably(file, own)

    def _file(self, received: Tensors) -> Path:
        pairs = peft_dir.factors(received)
        facts = {
            "lineage": self._lineage,
            "part": self._personal.part,
            "rank": self._personal.rank or _rank(received),
            "dtype": self._config.engine.dtype,
            "shapes": {module: (b.shape[0], a.shape[1]) for module, (a, b) in pairs.items()},
        }
        return self._folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"


def first(received: Tensors, personal: Personal, seed: str) -> Tensors:
    """Return the part of a site that has not trained yet: B as received, or an untrained adapter drawn by `seed`."""
    if personal.part == "B":
        return {name: received[name] for name in _names(received, "B")}
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    own: Tensors = {}
    for module, (a, b) in peft_dir.factors(received).items():
        shape = (b.shape[0], a.shape[1])
        own |= peft_dir.untrained(module, shape, personal.rank, a.dtype, generator)
    return own


def join(received: Tensors, own: Tensors, personal: Personal) -> Tensors:
    """Join both parts: the received A with the site's own B, or two adapters side by side, the received one first.

    Parts of different dtypes, as an old registry has them, are joined in float32.
    """
    if len({array.dtype for array in (*received.values(), *own.values())}) > 1:
        received, own = (peft_dir.rounded(part, "float32") for part in (received, own))
    if personal.part == "B":
        return {**received, **own}
    joined: Tensors = {}
    for module in peft_dir.factors(received):
        for factor, along in (("A", 0), ("B", 1)):
            name = peft_dir.key(module, factor)
            joined[name] = np.concatenate([received[name], own[name]], axis=along)
    return joined


def split(trained: Tensors, received: Tensors, personal: Personal) -> tuple[Tensors, Tensors]:
    """Split a trained join of `received` into (sent to the centre, kept here).

    Where B is kept, B is sent exactly as it was received: the centre can check that nothing personal came along.
    """
    own: Tensors = {}
    if personal.part == "B":
        own = {name: trained[name] for name in _names(received, "B")}
        return {name: received[name] if name in own else array for name, array in trained.items()}, own
    sent: Tensors = {}
    rank = _rank(received)
    for module, (a, b) in peft_dir.factors(trained).items():
        name_a, name_b = (peft_dir.key(module, factor) for factor in "AB")
        sent[name_a], own[name_a] = a[:rank], a[rank:]
        sent[name_b], own[name_b] = b[:, :rank], b[:, rank:]
    return sent, own


def served(config: SiteConfig, manifest: AdapterManifest, blob: bytes) -> tuple[AdapterManifest, bytes]:
    """Return the manifest and weights that this site serves of a version: joined to its own part, if it has one.

    A site that has not trained yet serves the version as received, as the first part would change nothing. Raises
    AdapterError as `PersonalPart.begin`.
    """
    if manifest.personal is None:
        return manifest, blob
    received = peft_dir.decode(blob)
    own = PersonalPart(config, manifest.name, manifest.lineage, manifest.personal).read(received)
    if own is None:
        return manifest, blob
    joined = peft_dir.encode(join(received, own, manifest.personal))
    facts = {"digest": peft_dir.digest(joined), "rank": manifest.joined_rank, "personal": None}
    return manifest.model_copy(update=facts), joined


def _rank(tensors: Tensors) -> int:
    return next(int(a.shape[0]) for a, _ in peft_dir.factors(tensors).values())


def _names(tensors: Tensors, factor: str) -> list[str]:
    return [peft_dir.key(module, factor) for module in peft_dir.factors(tensors)]
