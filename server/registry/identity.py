"""`Identity`: the id of a registry and the place of its weights, written once, as `<root>/registry.json`.

`strangers` names what lies in a registry's directory and is none of its files.
"""

import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from server.registry import version_dir
from server.registry.blobs import BlobStore
from server.registry.events import EVENTS
from server.registry.index import INDEX
from server.registry.run_lock import RUNS
from umbel import peft_dir
from umbel.adapter import AdapterManifest, is_name
from umbel.errors import RegistryError

Model = TypeVar("Model", bound=BaseModel)
IDENTITY, PIN, ALIASES = "registry.json", "pin.json", "aliases.jsonl"
_OWN = {
    IDENTITY,
    EVENTS,
    INDEX,
    f"{INDEX}-wal",
    f"{INDEX}-shm",
    f"{INDEX}-journal",
    "blobs",
    "nonce.key",
    RUNS,
    ".lock",
}
"""Names of a registry's files; earlier releases had one `.lock` for all adapters."""
_UNFINISHED = re.compile(r"\..+\.[0-9]+\.tmp")
"""Names of files, and folders of versions, that are being written, or that a killed writer left."""


class Identity(BaseModel):
    """The content of `registry.json`."""

    lineage: str
    """16 hex digits, part of every round key."""
    blobs: str = ""
    """fsspec URL of the weights; empty for `blobs/` in the registry's directory."""


def absolute(root: Path) -> Path:
    """Return the absolute path of a registry's directory.

    Raises RegistryError for a URL: as a path it would be a directory called `s3:` here.
    """
    if re.fullmatch(r"[a-z][a-z0-9+.-]+:", next(iter(root.parts), "")):
        raise RegistryError(
            f"{root}: a registry is a directory on this machine; its weights may lie elsewhere: "
            "`umbel registry init --registry DIR --blobs s3://bucket/prefix`"
        )
    return root.absolute()


def open_directory(root: Path, *, create: bool, blobs: str) -> Path:
    """Return the absolute path of a registry's directory, made if there is none and `create` says so.

    Raises RegistryError for a missing registry, and for a URL.
    """
    root = absolute(root)
    if not ((root / IDENTITY).is_file() or (root / INDEX).is_file() or _versions(root)):
        if not create:
            raise RegistryError(
                f"{root}: no adapter registry here; `umbel registry init` makes one, and so does `flwr run` at its "
                "`registry` setting"
            )
        if blobs:
            BlobStore(blobs)  # raises for a URL that cannot be used, before it is stored
        root.mkdir(parents=True, exist_ok=True)
    return root


def read(model: type[Model], path: Path) -> Model:
    """Read one of a registry's JSON files as a `model`; raise RegistryError when it is missing or damaged."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RegistryError(f"{path}: cannot be read, or was changed; restore it from your backup") from error


def establish(root: Path, blobs: str) -> None:
    """Write `registry.json` where there is none: for a new registry, or for one that lost the file.

    Raises RegistryError when the file is lost and nothing says where the weights are.
    """
    if (root / IDENTITY).is_file():
        return
    versions = _versions(root)
    if versions and not blobs and not any((path / peft_dir.WEIGHTS).exists() for path in versions):
        raise RegistryError(
            f"{root / IDENTITY} is gone, and the weights are not here; restore it, or say where they lie: "
            f"`umbel registry init --registry {root} --blobs URL`"
        )
    lineage = _lineage_of_versions(root) or secrets.token_hex(8)
    peft_dir.replace_durably(root / IDENTITY, Identity(lineage=lineage, blobs=blobs).model_dump_json().encode())


def adapters(root: Path) -> list[str]:
    """Return the names of the adapters that were begun, also of those without a version that can be listed."""
    folders = (path for path in root.iterdir() if is_name(path.name) and path.is_dir() and path.name != "blobs")
    return sorted(path.name for path in folders if (path / PIN).exists() or (path / ALIASES).exists())


def strangers(root: Path) -> list[str]:
    """Name everything in a registry's directory that is none of its files: nothing reads it, and nothing removes it."""
    return [f"{path}: is none of the registry's; nothing reads it; move it out of {root}" for path in _strangers(root)]


def _strangers(root: Path) -> Iterator[Path]:
    begun = set(adapters(root))
    places = set(version_dir.every(root))
    for entry in sorted(root.iterdir()):
        if entry.name in begun or any(place.parent == entry for place in places):
            for inner in _others(entry, {PIN, ALIASES}):
                if inner not in places:
                    yield inner
                elif inner.is_dir():
                    yield from _others(inner, version_dir.FILES)
        elif entry.name not in _OWN and not _UNFINISHED.fullmatch(entry.name):
            yield entry


def _others(folder: Path, own: set[str]) -> list[Path]:
    """Return the entries of a folder whose names are not its `own`, nor those of unfinished ones."""
    try:
        return sorted(
            path for path in folder.iterdir() if path.name not in own and not _UNFINISHED.fullmatch(path.name)
        )
    except OSError:  # the damage of what cannot be read is named elsewhere
        return []


def _versions(root: Path) -> list[Path]:
    """Return the directories that hold a manifest, where a version may be."""
    return [path for path in version_dir.every(root) if (path / peft_dir.MANIFEST).exists()]


def _lineage_of_versions(root: Path) -> str | None:
    """Return the lineage that most versions name; None where there are no versions."""
    found: Counter[str] = Counter()
    for path in _versions(root):
        with suppress(OSError, ValidationError):  # damaged ones are named when the versions are listed
            found[AdapterManifest.model_validate_json((path / peft_dir.MANIFEST).read_bytes()).lineage] += 1
    return found.most_common(1)[0][0] if found else None
