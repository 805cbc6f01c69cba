"""One version on disk: a PEFT directory with the sha256 of each file, as `sha256sum` writes it.

<root>/<name>/v000012/adapter_config.json        the settings of LoRA, for peft and SGLang
<root>/<name>/v000012/adapter_model.safetensors  a link to the weights, where they lie on this machine
<root>/<name>/v000012/manifest.json              everything that is known about the version
<root>/<name>/v000012/SHA256SUMS                 of the three; `sha256sum -c` needs nothing of ours
<root>/<name>/v000012/manifest.sig               the signature of the manifest; only where the centre signs
<root>/<name>/v000012/pruned.json                who removed the weights, when and why; only where that was done
"""

import os
import re
from pathlib import Path

from pydantic import BaseModel, ValidationError

from server.registry.blobs import BlobStore
from umbel import peft_dir, signing
from umbel.adapter import AdapterManifest, AdapterRef, is_name
from umbel.errors import AdapterError, RegistryError
from umbel.peft_dir import CONFIG, MANIFEST, WEIGHTS

SUMS, PRUNED, SIGNATURE = "SHA256SUMS", "pruned.json", "manifest.sig"
FILES = {CONFIG, WEIGHTS, MANIFEST, SUMS, PRUNED, SIGNATURE}
_FOLDER = re.compile(r"v([0-9]{6}|[1-9][0-9]{6,8})")
_UNFINISHED = re.compile(r"\.v[0-9]{6,9}\.[0-9]+\.tmp")


class Pruned(BaseModel):
    """Marker written when a version's weights were removed; the manifest stays for the lineage."""

    at: str
    """ISO 8601, UTC."""
    who: str
    why: str


def path(root: Path, ref: AdapterRef) -> Path:
    """Return a version's directory in a registry."""
    return root / ref.name / f"v{ref.version:06d}"


def every(root: Path, name: str = "*") -> list[Path]:
    """Return everything that stands where a version may, in order: versions, listed or not, and what is none."""
    return [path for path in sorted(root.glob(f"{name}/v[0-9]*")) if is_place(path)]


def is_place(path: Path) -> bool:
    """Return whether a version may have this path: the folder of an adapter, and a number as `path` writes it."""
    return bool(_FOLDER.fullmatch(path.name)) and is_name(path.parent.name) and path.parent.name != "blobs"


def unfinished(root: Path) -> list[Path]:
    """Return the half-written versions that killed publishers left, in order."""
    found = [path for path in root.glob("*/.v*.tmp") if _UNFINISHED.fullmatch(path.name) and is_name(path.parent.name)]
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def write(directory: Path, manifest: AdapterManifest, blobs: BlobStore, signature: str = "") -> str:
    """Write a version whose weights are in `blobs`, whole or not at all; return the content of its SHA256SUMS."""
    config = peft_dir.encode_config(manifest, base=f"sha256:{manifest.base}")
    files: dict[str, bytes | Path] = {CONFIG: config, MANIFEST: peft_dir.encode_manifest(manifest)}
    digests = {name: peft_dir.digest(content) for name, content in files.items() if isinstance(content, bytes)}
    sums = checksums({**digests, WEIGHTS: manifest.digest})
    weights = blobs.path(manifest.digest)
    if weights is not None:
        # A relative link inside the registry's directory, so that the directory can be moved as a whole.
        inside = weights.is_relative_to(directory.parents[1])
        files[WEIGHTS] = Path(os.path.relpath(weights, directory)) if inside else weights
    if signature:
        files[SIGNATURE] = f"{signature}\n".encode()
    peft_dir.place(directory, {**files, SUMS: sums.encode()})
    return sums


def read_manifest(directory: Path) -> tuple[AdapterManifest, str]:
    """Return a version's manifest and SHA256SUMS; raise RegistryError when they are missing, damaged or do not match.

    A SHA256SUMS that is gone is made from the other files.
    """
    try:
        content, config = (directory / MANIFEST).read_bytes(), (directory / CONFIG).read_bytes()
        manifest = AdapterManifest.model_validate_json(content)
    except OSError as error:
        raise RegistryError(f"{directory}: not an adapter version ({error.strerror}: {error.filename})") from error
    except ValidationError as error:
        raise RegistryError(f"{directory / MANIFEST}: not a manifest; the file was changed or damaged") from error
    found = checksums({CONFIG: peft_dir.digest(config), MANIFEST: peft_dir.digest(content), WEIGHTS: manifest.digest})
    if (sums := _content(directory / SUMS)) is not None and sums != found.encode():
        raise RegistryError(f"{directory}: {CONFIG}, {MANIFEST} or {SUMS} was changed or damaged")
    return manifest, found


def read_weights(directory: Path, manifest: AdapterManifest, blobs: BlobStore) -> bytes:
    """Return a version's safetensors bytes; raise RegistryError when they are missing, damaged or were pruned."""
    if (marker := _content(directory / PRUNED)) is not None:
        try:
            pruned = Pruned.model_validate_json(marker)
        except ValidationError as error:
            raise RegistryError(
                f"{directory}: its weights were removed; {PRUNED}, which says why, is damaged"
            ) from error
        raise RegistryError(f"{directory}: its weights were removed at {pruned.at} by {pruned.who}: {pruned.why}")
    own = directory / WEIGHTS
    content = None if own.is_symlink() else _content(own)  # a copy that stands in the place of the link
    if content is None:
        return blobs.get(manifest.digest)
    if peft_dir.digest(content) != manifest.digest:
        raise RegistryError(
            f"{own}: its sha256 is not the manifest's; the file was changed or damaged; restore it from your backup"
        )
    return content


def inspect(directory: Path, manifest: AdapterManifest, sums: str) -> list[str]:
    """Name each damage of a version's small files, given the manifest and SHA256SUMS that were published."""
    published = {name: digest for digest, name in (line.split("  ", 1) for line in sums.splitlines())}
    expected = {CONFIG: published[CONFIG], MANIFEST: published[MANIFEST], SUMS: peft_dir.digest(sums.encode())}
    damages = []
    for name, digest in expected.items():
        file = directory / name
        try:
            content = _content(file)
        except RegistryError as error:
            damages.append(str(error))
            continue
        if content is None:
            damages.append(f"{file}: is missing; restore it from your backup")
        elif peft_dir.digest(content) != digest:
            damages.append(f"{file}: its sha256 is not the one that was published; restore it from your backup")
    return damages


def inspect_weights(directory: Path, manifest: AdapterManifest, blobs: BlobStore) -> list[str]:
    """Name each damage of a version's weights; pruned ones have none."""
    if (directory / PRUNED).is_file():
        return []
    try:
        read_weights(directory, manifest, blobs)
    except RegistryError as error:
        return [str(error)]
    own, weights = directory / WEIGHTS, blobs.path(manifest.digest)
    if weights is not None and own.resolve() != weights.resolve() and (own.is_symlink() or not own.is_file()):
        return [f"{own}: does not lead to {weights}; make it a symbolic link to it"]
    return []


def _content(file: Path) -> bytes | None:
    """Return the bytes of a file, None where there is no file; raise RegistryError where it cannot be read."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise RegistryError(f"{file}: cannot be read ({error.strerror}); mend its permissions or its disk") from error


def signature_of(directory: Path) -> str:
    """Return the content of a version's `manifest.sig`; empty for one that is not signed."""
    file = directory / SIGNATURE
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def inspect_signature(directory: Path, manifest: AdapterManifest, key: signing.PublicKey) -> list[str]:
    """Name the fault of a signature that is not by `key`; empty where it is, and where there is no signature."""
    signature = signature_of(directory)
    try:
        if signature:
            signing.verify(key, manifest, signature)
    except AdapterError as error:
        return [f"{directory / SIGNATURE}: {error}"]
    return []


def checksums(digests: dict[str, str]) -> str:
    """Return the content of SHA256SUMS for file name → sha256, as `sha256sum` writes it."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
