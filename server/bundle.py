"""Copy the part of the repository that Flower ships, so that `flwr run` has no virtual environments to walk through."""

import shutil
import tomllib
from pathlib import Path

from umbel.errors import ConfigError


def export(repository: Path, into: Path) -> Path:
    """Copy pyproject.toml and the files that its `fab-include` names to `into`, and return that folder.

    `flwr build` and `flwr run` look at every file below the app's folder; this folder holds the app and nothing else.
    Raises ConfigError when `repository` has no pyproject.toml.
    """
    project = repository / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(f"{repository}: no pyproject.toml here; expected umbel's repository")
    globs = tomllib.loads(project.read_text())["tool"]["flwr"]["app"]["fab-include"]
    files = [file for pattern in globs for file in repository.glob(pattern)]
    for file in [project, *files]:
        copy = into / file.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return into
