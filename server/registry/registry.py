"""The adapter registry: immutable versions, aliases with a history, and an index that is made from the files.

<root>/registry.json            the registry's id, and where its weights lie
<root>/blobs/<sha256>           weights, each once, under the name of their content; or at any other fsspec URL
<root>/<name>/v000012/          a version (server/registry/version_dir.py): a PEFT directory, written whole, by rename
<root>/<name>/pin.json          what is held fast about the adapter (server/registry/pin.py)
<root>/<name>/aliases.jsonl     where its aliases point and pointed (server/registry/alias_log.py)
<root>/events.jsonl             what happened when (server/registry/events.py)
<root>/nonce.key                what the nonces of its orders are made with (server/orders.py)
<root>/registry.sqlite          the index; may be deleted, and is made anew
"""

import fcntl
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.registry import identity as registry_identity
from server.registry import version_dir
from server.registry.alias_log import HEAD, LIVE, PREVIOUS, SHADOW, AliasLog, Move
from server.registry.blobs import BlobStore
from server.registry.identity import ALIASES, IDENTITY, PIN, Identity
from server.registry.index import INDEX, VersionIndex
from server.registry.pin import Pin
from server.registry.round_log import RoundState, now, transaction
from umbel import peft_dir, signing
from umbel.adapter import AdapterManifest, AdapterRef, check_name
from umbel.errors import AdapterError, Conflict, NotFound, RegistryError
from umbel.faults import Point, reach
from umbel.messages import Submit
from umbel.signing import PrivateKey

__all__ = ["HEAD", "LIVE", "PREVIOUS", "SHADOW", "AdapterRegistry"]

log = logging.getLogger("umbel")


class AdapterRegistry:
    """Every version there ever was, and which of them is `head` and which is `live`.

    `create` makes a registry where there is none, with its weights at `blobs`; without it a missing one raises
    RegistryError. An index that is missing is made from the files; `lost` says what could not be restored. What is
    published is signed with `key`.
    """

    def __init__(self, root: Path, *, create: bool = False, blobs: str = "", key: PrivateKey | None = None) -> None:
        self._key = key
        registry_identity.require_local(root)
        root = self.root = root.absolute()
        if not ((root / IDENTITY).is_file() or (root / INDEX).is_file() or version_dir.every(root)):
            if not create:
                raise RegistryError(f"{root}: no adapter registry here; `flwr run` makes one at its `registry` setting")
            if blobs:
                BlobStore(blobs)  # refused before it is written down
            root.mkdir(parents=True, exist_ok=True)
        self.index = VersionIndex(root)
        self._database = self.index.database
        self.rounds = self.index.rounds
        if not (root / IDENTITY).is_file():
            with transaction(self._database):
                registry_identity.establish(root, self._database, blobs)
        self._identity = registry_identity.read(Identity, root / IDENTITY)
        if blobs and blobs != self._identity.blobs:
            raise Conflict(f"{root} keeps its weights at {self._identity.blobs or root / 'blobs'}, not at {blobs}")
        self.blobs = BlobStore(self._identity.blobs or str(root / "blobs"))
        self.lost: list[str] = []
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

    @contextmanager
    def exclusive(
        self, wait_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> Iterator[None]:
        """Hold the registry for one run; raise RegistryError if another one does for longer than `wait_s`."""
        deadline = clock() + wait_s
        with (self.root / ".lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if clock() >= deadline:
                        raise RegistryError(
                            f"{self.root}: another run works on this registry; wait for it, or stop it with `flwr stop`"
                        ) from error
                    sleep(0.5)
            yield

    # Reading

    def names(self) -> list[str]:
        """The adapters in this registry."""
        return self.index.names()

    def versions(self, name: str) -> list[AdapterManifest]:
        """The manifests of an adapter's versions, in order; empty for an unknown one."""
        return self.index.versions(name)

    def manifest(self, ref: AdapterRef) -> AdapterManifest:
        """A version's manifest as it was published; raise NotFound."""
        return self._entry(ref)[0]

    def aliases(self, name: str) -> dict[str, AdapterRef]:
        """`head`, `live` once a version was promoted, and the operator's own."""
        return {alias: AdapterRef(name, version) for alias, version in self._moves(name).aliases().items()}

    def pointers(self, name: str) -> dict[str, AdapterRef]:
        """`aliases`, and those that follow from them: `previous`, and `shadow` while a version is being judged."""
        found = self.aliases(name)
        previous = self._moves(name).previous()
        if previous is not None:
            found[PREVIOUS] = AdapterRef(name, previous)
        judged = [record.version for record in self.rounds.all(name) if not record.state.final]
        found.update((SHADOW, AdapterRef(name, version)) for version in judged if version is not None)
        return found

    def history(self, name: str, alias: str) -> list[tuple[AdapterRef, str, str]]:
        """(version, run id, ISO time) of every move of an alias, oldest first."""
        moves = [(move, move.to.get(alias)) for move in self.moves(name)]
        return [(AdapterRef(name, version), move.run_id, move.at) for move, version in moves if version is not None]

    def moves(self, name: str) -> list[Move]:
        """Every move of an adapter's aliases, with who made it and why, oldest first."""
        return self._moves(name).moves()

    def overruled(self, name: str, round: int) -> str:
        """Which operator moved `head` or `live` since a round began, and why; empty when nobody did."""
        record = self.rounds.find(name, round)
        return self._moves(name).overruling(self.rounds.expected(name, round), record.version if record else None)

    def pin(self, name: str) -> Pin | None:
        """What is held fast about an adapter; None before the first quorum of sites."""
        path = self.root / check_name(name) / PIN
        return registry_identity.read(Pin, path) if path.is_file() else None

    def resolve(self, text: str) -> AdapterRef:
        """`support@v3`, `support@live` or `support@sha256:0123abcd…` → its version; raise NotFound if there is none."""
        name, _, alias = text.partition("@")
        known = self.versions(name)
        pointers = self.pointers(name) if known else {}
        if alias in pointers:
            return pointers[alias]
        digest = re.fullmatch(r"sha256:([0-9a-f]{8,64})", alias)
        for manifest in reversed(known):
            if str(manifest.ref) == text or (digest and manifest.digest.startswith(digest[1])):
                return manifest.ref
        exist = [f"{name}@{alias}" for alias in pointers] + [str(manifest.ref) for manifest in known[-3:]]
        raise NotFound(
            f"{text!r} is not in {self.root}; there is {', '.join(exist) or ', '.join(self.names()) or 'nothing'}"
        )

    def read(self, ref: AdapterRef) -> tuple[bytes, AdapterManifest]:
        """A version's safetensors bytes and manifest; raise NotFound, or RegistryError when it is damaged."""
        manifest, sums = self._entry(ref)
        directory = self.directory(ref)
        for damage in version_dir.inspect(directory, manifest, sums):
            raise RegistryError(damage)
        return version_dir.read_weights(directory, manifest, self.blobs), manifest

    def directory(self, ref: AdapterRef) -> Path:
        """Where a version lies; where its weights are on this machine too, loadable by peft as it is."""
        return version_dir.path(self.root, ref)

    def verify(self, ref: AdapterRef) -> list[str]:
        """What is wrong with a version, file by file; empty when every byte is the one that was published."""
        manifest, sums = self._entry(ref)
        directory = self.directory(ref)
        damages = version_dir.inspect(directory, manifest, sums)
        return damages + version_dir.inspect_weights(directory, manifest, self.blobs)

    # Writing

    def begin(self, name: str, pin: Pin, seed: int) -> None:
        """Hold `pin` fast and publish v0, the untrained adapter, as `head`; no change where that was done before.

        Raises Conflict when the adapter is pinned to something else.
        """
        check_name(name)
        with transaction(self._database):
            held, versions = self.pin(name), self.versions(name)
            if held not in (None, pin) or any(known.base != pin.fingerprint.digest for known in versions):
                raise Conflict(f"{name} in {self.root} is pinned to another base, other layers, dtype or rank")
            if held is None:
                (self.root / name).mkdir(exist_ok=True)
                peft_dir.replace_durably(self.root / name / PIN, pin.model_dump_json(indent=2).encode())
                reach(Point.BEGIN_PINNED)
            if not versions:
                self._write(name, pin, peft_dir.encode(pin.initial(seed)), {"round": 0})
            if HEAD not in self.aliases(name):
                if len(versions) > 1:
                    raise RegistryError(
                        f"{name} in {self.root} has versions but no head: {name}/{ALIASES} is gone; restore it, or "
                        f"say where training goes on with `umbel adapter alias {name}@v{len(versions) - 1} head`"
                    )
                self._move(name, {HEAD: 0}, who="umbel", why="the untrained adapter")

    def publish(self, name: str, blob: bytes, *, round: int, run_id: str, parent: str, **facts: Any) -> AdapterManifest:
        """Add the version that a round made; `facts` are more fields of the manifest. Moves no alias.

        The round keeps its version: publishing it again returns the first one.
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
            self.rounds.record(
                name, round, run_id, RoundState.PUBLISHED, version=manifest.version, reasons=manifest.left_out
            )
        return manifest

    def accept(self, name: str, round: int, run_id: str, reasons: Mapping[str, str]) -> None:
        """Close a round whose version was promoted: `head` and `live` move to it, together.

        Raises Conflict when an operator moved them since the round began: that is not taken back.
        """
        with transaction(self._database):
            record = self.rounds.find(name, round)
            if record is None or record.version is None:
                raise NotFound(f"round {round} of {name} in {self.root} has no version to accept")
            if overruled := self.overruled(name, round):
                raise Conflict(overruled)
            to: dict[str, int | None] = {HEAD: record.version, LIVE: record.version}
            self._move(name, to, who="umbel", why=f"round {round} was accepted", run_id=run_id)
            self.rounds.record(name, round, run_id, RoundState.PROMOTED, reasons=reasons)

    def point(self, name: str, to: Mapping[str, AdapterRef | None], *, who: str, why: str) -> None:
        """Move aliases together, or remove them (None); raise NotFound, or RegistryError for one that cannot move."""
        with transaction(self._database):
            for alias, ref in to.items():
                self._require_movable(name, alias, ref)
            versions = {alias: None if ref is None else ref.version for alias, ref in to.items()}
            self._move(name, versions, who=who, why=why)

    def roll_back(self, name: str, *, who: str, why: str) -> AdapterRef:
        """Point `head` and `live` to `previous`, or to v0 from the first version; doing it twice comes back.

        The sites follow before the next step of a run. Raises NotFound while nothing was ever live.
        """
        first = self._moves(name).previous() is None and LIVE in self.aliases(name)
        previous = AdapterRef(name, 0) if first else self.resolve(f"{name}@{PREVIOUS}")
        self.point(name, {HEAD: previous, LIVE: previous}, who=who, why=why)
        return previous

    def sign(self, document: AdapterManifest | Submit) -> str:
        """A signature with the registry's key; empty where it has none."""
        return signing.sign(self._key, document) if self._key else ""

    def reindex(self) -> list[str]:
        """Make the index anew from the files; what could not be restored, in words."""
        with transaction(self._database):
            return self.index.rebuild(self.lineage)

    def _bring_up(self) -> None:
        """List what lies there and is not listed: everything, or what a killed publisher had just written."""
        if self.index.fresh:
            self.lost = self.index.rebuild(self.lineage)
            for what in self.lost:
                log.warning("registry.restored %s: %s", self.root, what)
        for path in self.index.unlisted():
            self.index.take_up(path, self.lineage)

    def _write(self, name: str, pin: Pin, blob: bytes, facts: dict[str, Any]) -> AdapterManifest:
        manifest = AdapterManifest(
            name=name, version=self.index.next_version(name), digest=self.blobs.put(blob),
            base=pin.fingerprint.digest, fingerprint=pin.fingerprint, lineage=self.lineage,
            rank=peft_dir.rank_of(peft_dir.decode(blob)),  # flora's may be above the pin's
            target_modules=pin.target_modules, created=now(), **facts,
        )  # fmt: skip
        sums = version_dir.write(self.directory(manifest.ref), manifest, self.blobs, self.sign(manifest))
        reach(Point.VERSION_RENAMED)
        self.index.add(manifest, sums)
        reach(Point.VERSION_LISTED)
        return manifest

    def _move(self, name: str, to: dict[str, int | None], *, who: str, why: str, run_id: str = "") -> None:
        """Append to the alias log; a move that was made before an interruption is not made again."""
        log_of = self._moves(name)
        if any(log_of.aliases().get(alias) != version for alias, version in to.items()):
            log_of.append(Move(at=now(), to=to, who=who, why=why, run_id=run_id))
            reach(Point.ALIASES_MOVED)

    def _require_movable(self, name: str, alias: str, ref: AdapterRef | None) -> None:
        if alias in (SHADOW, PREVIOUS):
            raise RegistryError(f"{alias} cannot be moved: it follows from the rounds and from where live was")
        if re.fullmatch(r"v\d+", alias):
            raise AdapterError(f"{alias!r} cannot be an alias: it is the name of a version")
        check_name(alias)
        if ref is None and alias not in self.aliases(name):
            raise NotFound(f"{name}@{alias} is not in {self.root}; there is {', '.join(self.aliases(name)) or 'none'}")
        if ref is None and alias in (HEAD, LIVE):
            raise RegistryError(f"{name}@{alias} cannot be removed, only moved")
        if ref is not None and (self.directory(ref) / version_dir.PRUNED).is_file():
            raise RegistryError(f"{ref} cannot be pointed at: its weights were removed")
        if ref is not None:
            self.read(ref)  # nothing is pointed at a version that could not be had

    def _moves(self, name: str) -> AliasLog:
        return AliasLog(self.root / check_name(name) / ALIASES)

    def _entry(self, ref: AdapterRef) -> tuple[AdapterManifest, str]:
        entry = self.index.find(ref)
        if entry is None:
            raise NotFound(f"{ref} is not in {self.root}")
        return entry
