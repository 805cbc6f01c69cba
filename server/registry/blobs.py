"""`BlobStore`: the weights of all versions, each under its sha256, in a directory or at any fsspec URL (`s3://…`)."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec

from umbel import peft_dir
from umbel.errors import RegistryError
from umbel.faults import Point, reach

_OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]+\.[0-9]+\.tmp")
"""Names of weights, and of weights that a killed writer left half-written."""


class BlobStore:
    """Immutable bytes as `<url>/<sha256>`.

    Credentials and endpoints come from the environment, as each fsspec file system documents (for `s3://` boto's
    variables, such as AWS_ENDPOINT_URL). Raises RegistryError for a URL whose file system is unknown or not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise RegistryError(f"{url}: not a place for weights ({error}); for s3:// install umbel[s3]") from error

    def put(self, content: bytes) -> str:
        """Store bytes, whole or not at all, and return their sha256. Bytes that are there already are written again."""
        digest = peft_dir.digest(content)
        local = self.path(digest)
        if local is None:
            self._files.pipe_file(self._key(digest), content)  # an object store never shows half an object
        else:
            local.parent.mkdir(parents=True, exist_ok=True)
            peft_dir.replace_durably(local, content)
        reach(Point.BLOB_WRITTEN)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the bytes; raise RegistryError when they are missing or have another sha256."""
        try:
            content: bytes = self._files.cat_file(self._key(digest))
        except FileNotFoundError as error:
            raise RegistryError(f"{self.where(digest)} is missing; restore it from your backup") from error
        except OSError as error:
            raise RegistryError(f"{self.where(digest)}: cannot be read ({error}); see that it can be") from error
        if peft_dir.digest(content) != digest:
            raise RegistryError(
                f"{self.where(digest)}: its sha256 is not the manifest's; the file was changed or damaged; restore it "
                "from your backup"
            )
        return content

    def digests(self) -> Iterator[str]:
        """Yield the name of all weights in the store, half-written files of killed writers included."""
        yield from (name for name in self._names() if _OURS.fullmatch(name))

    def foreign(self) -> list[str]:
        """Return the names of what is in the store and no weights; nothing reads it, and nothing removes it."""
        return sorted(name for name in self._names() if not _OURS.fullmatch(name))

    def _names(self) -> Iterator[str]:
        self._files.invalidate_cache()
        for key in self._files.find(self._root):
            yield str(key).removeprefix(self._root.rstrip("/") + "/")

    def remove(self, digest: str) -> int:
        """Delete a blob; return the number of bytes it had."""
        size = int(self._files.size(self._key(digest)))
        self._files.rm_file(self._key(digest))
        return size

    def bytes_here(self) -> int | None:
        """Return the bytes that the store takes on this machine's disk; None for an object store."""
        folder = self.path("")
        if folder is None:
            return None
        total = 0
        for file in folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # gc may remove files meanwhile
                total += file.stat().st_size
        return total

    def path(self, digest: str) -> Path | None:
        """Return a blob's path on this machine; None in an object store."""
        protocols = self._files.protocol
        local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        return Path(self._key(digest)) if local else None

    def where(self, digest: str) -> str:
        """Return a blob's path or URL, for messages."""
        return str(self.path(digest) or f"{self.url.rstrip('/')}/{digest}")

    def _key(self, digest: str) -> str:
        return f"{self._root.rstrip('/')}/{digest}"
