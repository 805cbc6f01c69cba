"""The run directory: names by which the daemon and SGLang's processes find each other's files and settings.

`RouterSettings`: says which keys open which names, and which classes their requests have.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict

from umbel import secret_file
from umbel.errors import ConfigError, EngineError
from umbel.peft_dir import replace_durably

if TYPE_CHECKING:  # SGLang's processes, which read what is here, know nothing of the site file
    from umbel.site.adapter_sections import AdapterSection, ServeSection
    from umbel.site.config import SiteConfig

RUN_DIR_VARIABLE = "UMBEL_RUN_DIR"
"""Environment variable with the directory that the daemon prepared; without it, umbel leaves SGLang as it is."""
PARENT_VARIABLE = "UMBEL_PARENT_PID"
"""Environment variable with the pid of the daemon, with which its engine ends."""
ADMIN_KEY = "admin.key"
"""Name of the file with the engine's own key, which changes with each start."""
ALIASES = "aliases.json"
"""Name of the file with the alias table (`serving.aliases.AliasTable`)."""
ROUTER = "router.json"
"""Name of the file of `RouterSettings`."""


class RouterSettings(BaseModel):
    """Contents of `router.json`, which the daemon writes before each start of the engine. No key is in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_keys: Path | None = None
    """File of the keys of `[engine].api_keys`."""
    adapter_keys: dict[str, Path] = {}
    """Name of an adapter, trained here or only served → the file of its own keys."""
    priorities: dict[str, Literal["interactive", "batch"]] = {}
    """Name of an adapter → the class of its requests that name none."""

    @classmethod
    def of(cls, config: "SiteConfig") -> Self:
        """Return the settings of a site."""
        named: tuple[AdapterSection | ServeSection, ...] = (*config.adapter, *config.serve)
        return cls(
            api_keys=config.engine.api_keys,
            adapter_keys={one.name: one.api_keys for one in named if one.api_keys is not None},
            priorities={one.name: one.priority for one in config.adapter},
        )

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read the settings; raise OSError or ValueError where the daemon left none, so that nothing is open by it."""
        return cls.model_validate_json((run_dir / ROUTER).read_text())

    def write(self, run_dir: Path) -> None:
        """Replace the settings; raise EngineError for a file of keys with which no router would start."""
        for file in filter(None, (self.api_keys, *self.adapter_keys.values())):
            try:
                secret_file.read_keys(file)
            except ConfigError as error:
                raise EngineError(f"no engine is started before this file of keys can be used: {error}") from error
        replace_durably(run_dir / ROUTER, self.model_dump_json(indent=2).encode())
        (run_dir / ROUTER).chmod(0o600)
