"""`validate`, `verify`: check the files of adapter versions, before they are stored and before they are loaded."""

import json
from pathlib import Path

from client.held_base import HeldBase
from client.journal import Version
from client.rounds import personal
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import AdapterError
from umbel.site.config import SiteConfig

NEEDED = ("r", "lora_alpha", "target_modules")
"""Keys of `adapter_config.json` that every release of peft writes; others may be missing."""


def directory(config: SiteConfig, ref: AdapterRef) -> Path:
    """Return the folder of a version at this site; no other version has the same."""
    return config.site.state_dir / "adapters" / ref.engine_name


def verify(config: SiteConfig, version: Version) -> Path:
    """Return the folder of a version after checking that every byte in it is as it was written for the engine.

    Raises AdapterError if not.
    """
    folder = directory(config, version.ref)
    _, stored = peft_dir.read(folder)
    expected, digest = version.manifest, version.manifest.digest
    own = {"digest": stored.digest, "rounding_of": stored.rounding_of}
    if expected.personal is not None:  # the files hold the site's own part, too; the journal's manifest does not
        expected = expected.model_copy(update={**own, "rank": stored.rank, "personal": stored.personal})
    elif stored.rounding_of == digest:
        expected = expected.model_copy(update=own)
    if stored != expected:
        raise AdapterError(f"{folder}: not the {version.ref} that was received; its files were changed or exchanged")
    _require_settings(folder / peft_dir.CONFIG, stored)
    return folder


def to_load(config: SiteConfig, manifest: AdapterManifest, blob: bytes) -> tuple[AdapterManifest, bytes]:
    """Return manifest and weights of a version as the engine loads them: joined to this site's part, in its dtype.

    Raises AdapterError as `PersonalPart.begin`, and for a number that the engine's dtype cannot hold.
    """
    joined, weights = personal.served(config, manifest, blob)
    tensors = peft_dir.decode(weights)
    if all(str(array.dtype) == config.engine.dtype for array in tensors.values()):
        return joined, weights
    weights = peft_dir.encode(peft_dir.rounded(tensors, config.engine.dtype))
    facts = {"digest": peft_dir.digest(weights), "rounding_of": joined.digest}
    return joined.model_copy(update=facts), weights


def _require_settings(path: Path, manifest: AdapterManifest) -> None:
    """Raise AdapterError unless `adapter_config.json` agrees with the weights. Keys outside NEEDED may be missing."""
    try:
        found = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{path}: missing, or changed or damaged ({error})") from error
    wanted = peft_dir.peft_config(rank=manifest.rank, target_modules=manifest.target_modules, base="")
    for key, value in wanted.items():
        if key != "base_model_name_or_path" and found.get(key, None if key in NEEDED else value) != value:
            raise AdapterError(f"{path}: {key} is {found.get(key)!r}, not {value!r}; the file was changed or damaged")


def validate(
    config: SiteConfig, base: HeldBase, shapes: peft_dir.Shapes, name: str, manifest: AdapterManifest, blob: bytes,
) -> None:  # fmt: skip
    """Check that `blob` is the version of the manifest and that this site can serve it.

    Raises AdapterError, BaseMismatch.
    """
    if manifest.name != name:
        raise AdapterError(f"{manifest.ref} is no version of {name}")
    base.require(f"{manifest.ref} was trained on", manifest.base, manifest.kin)
    if peft_dir.digest(blob) != manifest.digest:
        raise AdapterError(f"{manifest.ref}: its bytes are not those of its manifest; send it again")
    tensors = peft_dir.decode(blob)
    known = ("float32", config.engine.dtype)
    wrong = next((key for key, array in tensors.items() if str(array.dtype) not in known), None)
    if wrong is not None:
        raise AdapterError(
            f"{manifest.ref}: {wrong} is {tensors[wrong].dtype}; a version is float32, and this site serves "
            f"{config.engine.dtype}"
        )
    peft_dir.validate(tensors, shapes, rank=manifest.rank, max_rank=config.max_rank(name))
