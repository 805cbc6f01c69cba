"""`ReadableSite`: a site file with a base whose tokenizer is real, and files of examples that a test writes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from scripts.tools.processes import free_port
from umbel.cli.main import app
from umbel.site.template import Tables, site_toml

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
"""Variables that the commands set for transformers; a runner takes them back."""


class ReadableSite:
    """A folder with `site.toml` and `train.jsonl`; commands run in this process, which has transformers already."""

    def __init__(self, folder: Path, model: Path, tables: Tables | None = None) -> None:
        self.folder = folder
        self.file = folder / "site.toml"
        self.data = folder / "train.jsonl"
        wanted = {"engine": {"dtype": "float32"}, **(tables or {})}  # no warning about the CPU of this machine
        self.file.write_text(site_toml(wanted, model=model, port=free_port()))

    def write(self, examples: Iterable[Any], name: str = "train.jsonl") -> Path:
        """Write examples one per line; a text as it is."""
        path = self.folder / name
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in examples))
        return path

    def numbered(self, count: int, name: str = "train.jsonl") -> Path:
        """Write examples that all differ, also from those of files with other names."""
        return self.write(({"prompt": f"{name} {number}", "completion": "b"} for number in range(count)), name)

    def umbel(self, command: str, *arguments: str | Path) -> Result:
        """Run `umbel COMMAND site.toml …`."""
        return CliRunner(env=QUIET).invoke(app, [command, str(self.file), *map(str, arguments)])

    def lines(self, command: str, *arguments: str | Path) -> list[dict[str, Any]]:
        """Return the JSON objects that a command prints, one per line."""
        return [json.loads(line) for line in self.umbel(command, *arguments).stdout.splitlines()]
