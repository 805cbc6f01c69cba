"""`AdapterRegistry`: immutable versions, aliases with a history, and an index that is made from the files.

<root>/registry.json            the registry's id, and the place of its weights
<root>/blobs/<sha256>           weights, each once, named by their content; or at any other fsspec URL
<root>/<name>/v000012/          a version (server/registry/version_dir.py): a PEFT directory, written whole, by rename
<root>/<name>/pin.json          base, layers, dtype and rank of the adapter (server/registry/pin.py)
<root>/<name>/aliases.jsonl     every move of the adapter's aliases (server/registry/alias_log.py)
<root>/.runs/<name>/            the lock of the adapter's run, and what the run spools (server/registry/run_lock.py)
<root>/events.jsonl             the events of every run (server/registry/events.py)
<root>/nonce.key                the key of the nonces in orders (server/orders.py)
<root>/registry.sqlite          the index; rebuilt from the files where it is missing (server/registry/index.py)
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.registry import identity as registry_identity
from server.registry import index, version_dir
from server.registry.alias_log import HEAD, LIVE, PREVIOUS, SHADOW, Aliases, AliasLog, Move, check_alias
from server.registry.blobs import BlobStore
from server.registry.identity import ALIASES, IDENTITY, PIN, Identity
from server.registry.index import VersionIndex
from server.registry.pin import Pin
from server.registry.round_log import RoundState, now
from umbel import peft_dir, signing
from umbel.adapter import AdapterManifest, AdapterRef, check_name
from umbel.errors import Conflict, NotFound, RegistryError
from umbel.faults import Point, reach
from umbel.messages import Submit
from umbel.signing import PrivateKey
from umbel.transaction import transaction

__all__ = ["HEAD", "IMPORTED", "LIVE", "PREVIOUS", "SHADOW", "AdapterRegistry"]

log = logging.getLogger("umbel")

IMPORTED = "imported"
"""`strategy` of a version that was trained elsewhere."""


class AdapterRegistry:
    """All versions of a federation's adapters, and the aliases that point to them.

    `create` makes a registry where there is none, with its weights at the fsspec URL `blobs`; without it a missing one
    raises RegistryError. A missing index is rebuilt from the files, and `lost` names everything that could not be
    restored. New versions are signed with `key`.

    >>> registry = AdapterRegistry(Path("/srv/umbel/registry"), create=True)
    >>> registry.begin("support", pin, seed=0)  # publishes support@v0, the untrained adapter, as `head`
    >>> parent = registry.manifest(registry.resolve("support@head"))
    >>> version = registry.publish("support", blob, round=1, run_id="1", parent=parent.digest)
    >>> registry.accept("support", round=1, run_id="1", reasons={})  # moves `head` and `live` to it
    >>> registry.point("support", {"stable": version.ref}, who="eva", why="passed the audit")
    >>> weights, manifest = registry.read(registry.resolve("support@stable"))
    """

    def __init__(self, root: Path, *, create: bool = False, blobs: str = "", key: PrivateKey | None = None) -> None:
        self._key = key
        root = self.root = registry_identity.open_directory(root, create=create, blobs=blobs)
        self.index = VersionIndex(root)
        self._database, self.rounds = self.index.database, self.index.rounds
        if not (root / IDENTITY).is_file():
            with transaction(self._database):
                registry_identity.establish(root, blobs)
        self._identity = registry_identity.read(Identity, root / IDENTITY)
        if blobs and blobs != self._identity.blobs:
            raise Conflict(f"{root} keeps its weights at {self._identity.blobs or root / 'blobs'}, not at {blobs}")
        self.blobs = BlobStore(self._identity.blobs or str(root / "blobs"))
        self.lost: list[str] = []
        with index.explained(root):
            if self.index.fresh or self.index.unlisted():
                with transaction(self._database):
                    self._bring_up()

    def close(self) -> None:
        """Close the index; the registry cannot be used afterwards."""
        self._database.close()

    @property
    def lineage(self) -> str:
        """16 hex digits, made once per registry; part of every round key."""
        return self._identity.lineage

    # Reading

    def names(self) -> list[str]:
        """The adapters in this registry."""
        return self.index.names()

    def versions(self, name: str) -> list[AdapterManifest]:
        """The manifests of an adapter's versions, in order; empty for an unknown one."""
        return self.index.versions(name)

    def manifest(self, ref: AdapterRef) -> AdapterManifest:
        """A version's manifest as it was published; raise NotFound if there is no such version."""
        return self.index.get(ref)[0]

    def aliases(self, name: str) -> dict[str, AdapterRef]:
        """`head`, `live` once a version was promoted, and the operator's own; each → its version."""
        return self._aliases(name).stored()

    def pointers(self, name: str) -> dict[str, AdapterRef]:
        """`aliases`, and those that follow from them: `previous`, and `shadow` while a version is being judged."""
        return self._aliases(name).all()

    def history(self, name: str, alias: str) -> list[tuple[AdapterRef, str, str]]:
        """(version, run id, ISO time) of every move of an alias, oldest first."""
        return self._aliases(name).history(alias)

    def moves(self, name: str) -> list[Move]:
        """Every move of an adapter's aliases, with who made it and why, oldest first."""
        return self._alias_log(name).moves()

    def overruled(self, name: str, round: int) -> str:
        """Say which operator moved `head` or `live` since a round began, and why; empty when nobody did."""
        return self._aliases(name).overruled(round)

    def pin(self, name: str) -> Pin | None:
        """Return the adapter's pin; None before the first quorum of sites."""
        path = self.root / check_name(name) / PIN
        return registry_identity.read(Pin, path) if path.is_file() else None

    def resolve(self, text: str) -> AdapterRef:
        """Return the version of `support@v3`, `support@live` or `support@sha256:0123abcd…`; raise NotFound."""
        name, _, alias = text.partition("@")
        known = self.versions(name)
        digest = re.fullmatch(r"sha256:([0-9a-f]{8,64})", alias)
        for manifest in reversed(known):
            if str(manifest.ref) == text or (digest and manifest.digest.startswith(digest[1])):
                return manifest.ref
        pointers = self.pointers(name) if known else {}
        if alias in pointers:
            return pointers[alias]
        exist = [f"{name}@{alias}" for alias in pointers] + [str(manifest.ref) for manifest in known[-3:]]
        raise NotFound(
            f"{text!r} is not in {self.root}; there is {', '.join(exist) or ', '.join(self.names()) or 'nothing'}"
        )

    def read(self, ref: AdapterRef) -> tuple[bytes, AdapterManifest]:
        """Return a version's safetensors bytes and manifest; raise NotFound, or RegistryError when it is damaged."""
        manifest, sums = self.index.get(ref)
        directory = self.directory(ref)
        for damage in version_dir.inspect(directory, manifest, sums):
            raise RegistryError(damage)
        return version_dir.read_weights(directory, manifest, self.blobs), manifest

    def directory(self, ref: AdapterRef) -> Path:
        """Return a version's directory; peft can load it as it is where the weights are on this machine."""
        return version_dir.path(self.root, ref)

    def verify(self, ref: AdapterRef) -> list[str]:
        """Name each damage of a version, file by file; empty when every byte is the one that was published."""
        manifest, sums = self.index.get(ref)
        directory = self.directory(ref)
        damages = version_dir.inspect(directory, manifest, sums)
        return damages + version_dir.inspect_weights(directory, manifest, self.blobs)

    # Writing

    def begin(self, name: str, pin: Pin, seed: int) -> None:
        """Store `pin` and publish v0, the untrained adapter, as `head`; no change where that was done before.

        Raises Conflict when the adapter is pinned to something else.
        """
        if check_name(name) == "blobs":
            raise RegistryError(f"an adapter cannot be called blobs: {self.root}/blobs holds the weights; rename it")
        with transaction(self._database):
            held, versions = self.pin(name), self.versions(name)
            if held not in (None, pin) or any(known.base != pin.fingerprint.digest for known in versions):
                raise Conflict(f"{name} in {self.root} is pinned to another base, other layers, dtype or rank")
            if held is None:
                (self.root / name).mkdir(exist_ok=True)
                peft_dir.replace_durably(self.root / name / PIN, pin.model_dump_json(indent=2).encode())
                reach(Point.BEGIN_PINNED)
            if not versions and (head := self.aliases(name).get(HEAD)):
                raise RegistryError(self.index.missing(head))
            if not versions:
                self._write(name, pin, peft_dir.encode(pin.initial(seed)), {"round": 0})
            if HEAD not in self.aliases(name):
                if len(versions) > 1:
                    raise RegistryError(
                        f"{name} in {self.root} has versions but no head: {name}/{ALIASES} is gone; restore it, or "
                        f"say where training goes on with `umbel adapter alias {name}@v{len(versions) - 1} head`"
                    )
                self._aliases(name).move({HEAD: 0}, who="umbel", why="the untrained adapter")

    def publish(self, name: str, blob: bytes, *, round: int, run_id: str, parent: str, **facts: Any) -> AdapterManifest:
        """Add the version that a round made, or (0) none; `facts` are more fields of the manifest. No alias moves.

        `blob`: safetensors bytes; `parent`: digest of the version that training started from. A round has one version:
        publishing again returns the first. Raises RegistryError before `begin`.
        """
        with transaction(self._database):
            pin = self.pin(name)
            if pin is None:
                raise RegistryError(f"{name} in {self.root} was never begun; nothing can be published")
            record = self.rounds.find(name, round)
            if record is not None and record.version is not None:
                return self.manifest(AdapterRef(name, record.version))
            facts = {"parents": (parent,), **facts, "round": round, "run_id": run_id, "parent": parent}
            manifest = self._write(name, pin, blob, facts)
            if round:
                self.rounds.record(
                    name,
                    round,
                    run_id,
                    RoundState.PUBLISHED,
                    version=manifest.version,
                    reasons={**manifest.skipped, **manifest.left_out},
                )
        return manifest

    def accept(self, name: str, round: int, run_id: str, reasons: Mapping[str, str]) -> None:
        """Close a round whose version was promoted: `head` and `live` move to it, together.

        Raises NotFound for a round without a version, and Conflict when an operator moved those aliases since the round
        began: the operator's move stands.
        """
        with transaction(self._database):
            record = self.rounds.find(name, round)
            if record is None or record.version is None:
                raise NotFound(f"round {round} of {name} in {self.root} has no version to accept")
            if overruled := self.overruled(name, round):
                raise Conflict(overruled)
            to: dict[str, int | None] = {HEAD: record.version, LIVE: record.version}
            self._aliases(name).move(to, who="umbel", why=f"round {round} was accepted", run_id=run_id)
            self.rounds.record(name, round, run_id, RoundState.PROMOTED, reasons=reasons)

    def point(self, name: str, to: Mapping[str, AdapterRef | None], *, who: str, why: str) -> None:
        """Move aliases together, or remove them (None).

        Raises NotFound for a version or alias that is not there, AdapterError for a word that cannot be an alias, and
        RegistryError for an alias that cannot be moved.
        """
        with transaction(self._database):
            for alias, ref in to.items():
                self._require_movable(name, alias, ref)
            versions = {alias: None if ref is None else ref.version for alias, ref in to.items()}
            self._aliases(name).move(versions, who=who, why=why)

    def roll_back(self, name: str, *, who: str, why: str) -> AdapterRef:
        """Point `head` and `live` to `previous`, or to v0 from the first version; a second call undoes the first.

        The sites follow before the next step of a run. Raises NotFound while nothing was ever live.
        """
        first = self._aliases(name).previous() is None and LIVE in self.aliases(name)
        previous = AdapterRef(name, 0) if first else self.resolve(f"{name}@{PREVIOUS}")
        self.point(name, {HEAD: previous, LIVE: previous}, who=who, why=why)
        return previous

    def sign(self, document: AdapterManifest | Submit) -> str:
        """Sign a document with the registry's key; return an empty signature where there is none."""
        return signing.sign(self._key, document) if self._key else ""

    def reindex(self) -> list[str]:
        """Rebuild the index from the files; return a line for each thing that could not be restored."""
        with transaction(self._database):
            return self.index.rebuild(self.lineage)

    def _bring_up(self) -> None:
        """List what is on disk and not in the index: all, the last version of a killed publisher, or what is none."""
        fresh = self.index.fresh
        self.lost = self.index.rebuild(self.lineage) if fresh else self.index.take_up(self.lineage)
        for what in self.lost:
            log.warning("registry.%s %s: %s", "restored" if fresh else "damaged", self.root, what)

    def _write(self, name: str, pin: Pin, blob: bytes, facts: dict[str, Any]) -> AdapterManifest:
        version = self.index.next_version(name, self._alias_log(name).named())
        manifest = AdapterManifest(
            name=name, version=version, digest=self.blobs.put(blob),
            base=pin.fingerprint.digest, fingerprint=pin.fingerprint, lineage=self.lineage,
            rank=peft_dir.rank_of(peft_dir.decode(blob)),  # flora's rank may exceed the pin's
            target_modules=pin.target_modules, created=now(), **facts,
        )  # fmt: skip
        sums = version_dir.write(self.directory(manifest.ref), manifest, self.blobs, self.sign(manifest))
        reach(Point.VERSION_RENAMED)
        self.index.add(manifest, sums)
        reach(Point.VERSION_LISTED)
        return manifest

    def _require_movable(self, name: str, alias: str, ref: AdapterRef | None) -> None:
        check_alias(alias)
        if ref is None and alias not in self.aliases(name):
            raise NotFound(f"{name}@{alias} is not in {self.root}; there is {', '.join(self.aliases(name)) or 'none'}")
        if ref is None and alias in (HEAD, LIVE):
            raise RegistryError(f"{name}@{alias} cannot be removed, only moved")
        if ref is not None and (self.directory(ref) / version_dir.PRUNED).is_file():
            raise RegistryError(f"{ref} cannot be pointed at: its weights were removed")
        if ref is not None:
            self.read(ref)  # an alias never points to a version that cannot be read

    def _aliases(self, name: str) -> Aliases:
        return Aliases(name, self._alias_log(name), self.rounds)

    def _alias_log(self, name: str) -> AliasLog:
        return AliasLog(self.root / check_name(name) / ALIASES)
