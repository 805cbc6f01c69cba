"""`Identity`: the id of a registry and the place of its weights, written once, as `<root>/registry.json`."""

import re
import secrets
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from server.registry import version_dir
from server.registry.blobs import BlobStore
from server.registry.index import INDEX
from umbel import peft_dir
from umbel.adapter import AdapterManifest
from umbel.errors import RegistryError

Model = TypeVar("Model", bound=BaseModel)
IDENTITY, PIN, ALIASES = "registry.json", "pin.json", "aliases.jsonl"


class Identity(BaseModel):
    """The content of `registry.json`."""

    lineage: str
    """16 hex digits, part of every round key."""
    blobs: str = ""
    """fsspec URL of the weights; empty for `blobs/` in the registry's directory."""


def open_directory(root: Path, *, create: bool, blobs: str) -> Path:
    """Return the absolute path of a registry's directory, made if there is none and `create` says so.

    Raises RegistryError for a missing registry, and for a URL: as a path it would be a directory called `s3:` here.
    """
    if re.fullmatch(r"[a-z][a-z0-9+.-]+:", next(iter(root.parts), "")):
        raise RegistryError(
            f"{root}: a registry is a directory on this machine; its weights may lie elsewhere: "
            "`umbel registry init --registry DIR --blobs s3://bucket/prefix`"
        )
    root = root.absolute()
    if not ((root / IDENTITY).is_file() or (root / INDEX).is_file() or version_dir.every(root)):
        if not create:
            raise RegistryError(f"{root}: no adapter registry here; `flwr run` makes one at its `registry` setting")
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
    versions = version_dir.every(root)
    if versions and not blobs and not any((path / peft_dir.WEIGHTS).exists() for path in versions):
        raise RegistryError(
            f"{root / IDENTITY} is gone, and the weights are not here; restore it, or say where they lie: "
            f"`umbel registry init --registry {root} --blobs URL`"
        )
    lineage = _lineage_of_versions(root) or secrets.token_hex(8)
    peft_dir.replace_durably(root / IDENTITY, Identity(lineage=lineage, blobs=blobs).model_dump_json().encode())


def _lineage_of_versions(root: Path) -> str | None:
    """Return the lineage that most versions name; None where there are no versions."""
    found: Counter[str] = Counter()
    for path in version_dir.every(root):
        with suppress(OSError, ValidationError):  # damaged ones are named when the versions are listed
            found[AdapterManifest.model_validate_json((path / peft_dir.MANIFEST).read_bytes()).lineage] += 1
    return found.most_common(1)[0][0] if found else None
