"""The part of an adapter that stays at its site, joined to what the sites share, to be trained and served as one.

    received ──join──► trained, served ──split──► sent to the centre, kept here

Either B is a site's own (FedSA-LoRA, arXiv 2410.01463), or a whole adapter P beside the shared G (dual adapters, as in
FedDPA, arXiv 2403.19211, and FDLoRA, arXiv 2406.07925). All is canonical (alpha == r), so adapters side by side are
their sum: [B_G | B_P] [A_G; A_P] = B_G A_G + B_P A_P. Shapes: A [rank, in], B [out, rank].
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from umbel import peft_dir
from umbel.adapter import AdapterManifest, Personal
from umbel.config import SiteConfig
from umbel.errors import AdapterError
from umbel.peft_dir import Tensors


class PersonalPart:
    """What this site keeps of one adapter between the rounds of one registry, in `<state_dir>/personal/<adapter>`.

    Another lineage, kind, rank, dtype or set of layers has another file: the site begins anew there, and finds the old
    part again when it comes back. The files never leave this machine.
    """

    def __init__(self, config: SiteConfig, adapter: str, lineage: str, personal: Personal) -> None:
        self._config = config
        self._folder = config.site.state_dir / "personal" / adapter
        self._lineage = lineage
        self._personal = personal

    def begin(self, received: Tensors, seed: int) -> Tensors:
        """What a round trains: `received`, joined to this site's part, or to its first one, drawn by `seed` and site.

        Raises AdapterError when the engine cannot hold both, or the part is damaged.
        """
        own = self.read(received)
        if own is None:
            own = first(received, self._personal, f"{seed} {self._config.site.name}")
        return join(received, own, self._personal)

    def read(self, received: Tensors) -> Tensors | None:
        """This site's part, as it fits `received`; None while no round has made one. Raises AdapterError as `begin`."""
        rank, most = _rank(received), self._config.engine.max_lora_rank
        if rank + self._personal.rank > most:
            raise AdapterError(
                f"adapter: rank {rank} and this site's own part of rank {self._personal.rank} are joined to one of "
                f"rank {rank + self._personal.rank}, over [engine].max_lora_rank = {most}; raise it here and restart, "
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
        """Let `own`, as `split` made it beside `received`, be this site's part from now on; it is on disk on return."""
        file = self._file(received)
        file.parent.mkdir(parents=True, exist_ok=True)
        peft_dir.replace_durably(file, own)

    def _file(self, received: Tensors) -> Path:
        pairs = peft_dir.factors(received)
        facts = {
            "lineage": self._lineage,
            "part": self._personal.part,
            "rank": self._personal.rank or _rank(received),
            "dtype": str(next(iter(received.values())).dtype),
            "shapes": {module: (b.shape[0], a.shape[1]) for module, (a, b) in pairs.items()},
        }
        return self._folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"


def first(received: Tensors, personal: Personal, seed: str) -> Tensors:
    """The part of a site that has not trained yet: B as it was received; or an adapter as peft makes it.

    That is A Kaiming-uniform (a = √5), which is ±1/√in, and B zero: joined, it changes nothing.
    """
    if personal.part == "B":
        return {name: received[name] for name in _names(received, "B")}
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    own: Tensors = {}
    for module, (a, b) in peft_dir.factors(received).items():
        bound = 1 / np.sqrt(a.shape[1])
        drawn = generator.uniform(-bound, bound, (personal.rank, a.shape[1]))
        own[peft_dir.key(module, "A")] = drawn.astype(a.dtype)
        own[peft_dir.key(module, "B")] = np.zeros((b.shape[0], personal.rank), b.dtype)
    return own


def join(received: Tensors, own: Tensors, personal: Personal) -> Tensors:
    """One adapter of both: A received, with the site's own B; or two adapters side by side, the received one first."""
    if personal.part == "B":
        return {**received, **own}
    joined: Tensors = {}
    for module in peft_dir.factors(received):
        for factor, along in (("A", 0), ("B", 1)):
            name = peft_dir.key(module, factor)
            joined[name] = np.concatenate([received[name], own[name]], axis=along)
    return joined


def split(trained: Tensors, received: Tensors, personal: Personal) -> tuple[Tensors, Tensors]:
    """What is sent, and what is kept, of a join of `received` that was trained.

    Where B is kept, it is sent as it was received, to the bit: the centre sees that nothing of a site's own came along.
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
    """What this site serves of a version: the version itself, or joined to the part that stays here, with its manifest.

    A site that has not trained yet serves what it received: the first part would change nothing. Raises AdapterError as
    `PersonalPart.begin`.
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
