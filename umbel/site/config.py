"""`SiteConfig`: the settings of a site. Order: defaults < TOML < environment (`UMBEL_SITE__ENGINE__PORT`)."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from umbel.errors import ConfigError, NotFound
from umbel.site import file as site_file
from umbel.site import variables
from umbel.site.sections import (
    AdapterSection,
    EngineSection,
    ExamplesSection,
    MetricsSection,
    ModelSection,
    ShadowSection,
    SiteSection,
    SloSection,
    TrainingSection,
)

OPERATOR_SOCKET = "operator.sock"
"""Name of the operator's socket in state_dir, which only the daemon's own user can open."""


class SiteConfig(BaseSettings):
    """All settings of a site, resolved and frozen; the fields are the tables of the site file.

    >>> config = SiteConfig.load(Path("sites/clinic-a.toml"))
    >>> config.engine.port
    30000
    >>> config.training.data  # relative paths start at the file's folder
    PosixPath('/srv/umbel/sites/private/train.jsonl')
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=variables.PREFIX, env_nested_delimiter="__"
    )

    site: SiteSection
    model: ModelSection
    adapter: tuple[AdapterSection, ...] = Field(min_length=1, max_length=1)
    engine: EngineSection
    slo: SloSection = SloSection()
    training: TrainingSection
    shadow: ShadowSection = ShadowSection()
    metrics: MetricsSection | None = None
    examples: ExamplesSection = ExamplesSection()

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        if self.model.served_name in self.adapters:
            raise ValueError(
                f"model.served_name and adapter.0.name are both {self.model.served_name!r}; users could not tell them "
                "apart, so give the base another served_name"
            )
        return self

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that users can ask for."""
        return tuple(section.name for section in self.adapter)

    def require_adapter(self, name: str) -> None:
        """Raise NotFound unless this site has an adapter of that name."""
        if name not in self.adapters:
            raise NotFound(f"there is no adapter {name!r} here; there is {', '.join(self.adapters)}")

    @property
    def socket(self) -> Path:
        """The Unix socket of the control API for the ClientApp."""
        return self.site.socket or self.site.state_dir / "site.sock"

    @property
    def operator_socket(self) -> Path:
        """The Unix socket of the control API for the operator's commands and the site's own engine."""
        return self.site.state_dir / OPERATOR_SOCKET

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return variables.Environment(
            settings_cls
        ), init_settings  # the first wins: the environment over the file, which `load` passes

    @classmethod
    def load(cls, path: Path) -> "SiteConfig":
        """Read a site file and the environment. Relative paths start at the file's folder, a variable's, too.

        Raises ConfigError with one line per mistake; each line begins with the file or the environment variable.
        """
        tables = site_file.read(path)
        told = variables.mistakes(cls)
        lines = [f"{name}: {why}" for name, why in told.items()]
        if any(why.startswith("not JSON") for why in told.values()):  # nothing can be read before it is
            raise ConfigError("\n".join(lines))
        try:
            config = cls(**tables)
        except ValidationError as error:
            lines += site_file.explain(cls, error, path, told=told)
            raise ConfigError("\n".join(lines)) from error
        if lines:
            raise ConfigError("\n".join(lines))
        return site_file.rooted(config, path)
