"""The weights of all versions, each under its sha256, wherever fsspec reaches: a directory, `s3://…`, `gs://…`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import fsspec

from umbel import peft_dir
from umbel.errors import RegistryError
from umbel.faults import Point, reach


class BlobStore:
    """Immutable bytes as `<url>/<sha256>`.

    Credentials and endpoints come from the environment, as each fsspec file system documents (for `s3://` boto's
    variables, such as AWS_ENDPOINT_URL). Raises RegistryError for a URL of which nothing is known or installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise RegistryError(f"{url}: not a place for weights ({error}); for s3:// install umbel[s3]") from error

    def put(self, content: bytes) -> str:
        """Store bytes, whole or not at all, and return their sha256. What is there already is written anew."""
        digest = peft_dir.digest(content)
        local = self.path(digest)
        if local is None:
            self._files.pipe_file(self._key(digest), content)  # an object store shows an object when it is whole
        else:
            local.parent.mkdir(parents=True, exist_ok=True)
            peft_dir.replace_durably(local, content)
        reach(Point.BLOB_WRITTEN)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes; raise RegistryError when they are missing or not those of their name."""
        try:
            content: bytes = self._files.cat_file(self._key(digest))
        except FileNotFoundError as error:
            raise RegistryError(f"{self.where(digest)} is missing; restore it from your backup") from error
        if peft_dir.digest(content) != digest:
            raise RegistryError(
                f"{self.where(digest)}: its sha256 is not the manifest's; the file was changed or damaged; restore it "
                "from your backup"
            )
        return content

    def digests(self) -> Iterator[str]:
        """Every name under which something lies there, half-written ones of killed writers included."""
        self._files.invalidate_cache()
        for key in self._files.find(self._root):
            yield str(key).rsplit("/", 1)[-1]

    def remove(self, digest: str) -> int:
        """Delete what lies under a name; the number of bytes it had."""
        size = int(self._files.size(self._key(digest)))
        self._files.rm_file(self._key(digest))
        return size

    def bytes_here(self) -> int | None:
        """How much lies on this machine's disk; None for an object store."""
        folder = self.path("")
        if folder is None:
            return None
        total = 0
        for file in folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # gc may run beside
                total += file.stat().st_size
        return total

    def path(self, digest: str) -> Path | None:
        """Where a blob lies on this machine; None for one that lies elsewhere."""
        protocols = self._files.protocol
        local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        return Path(self._key(digest)) if local else None

    def where(self, digest: str) -> str:
        """What a message calls a blob."""
        return str(self.path(digest) or f"{self.url.rstrip('/')}/{digest}")

    def _key(self, digest: str) -> str:
        return f"{self._root.rstrip('/')}/{digest}"
