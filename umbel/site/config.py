"""`SiteConfig`: the settings of a site. Order: defaults < TOML < environment (`UMBEL_SITE__ENGINE__PORT`)."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from umbel.errors import ConfigError, NotFound
from umbel.site import file as site_file
from umbel.site import variables
from umbel.site.adapter_sections import AdapterSection, GuardSection, ServeSection
from umbel.site.sections import (
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
    >>> config.data("support")  # relative paths start at the file's folder
    PosixPath('/srv/umbel/sites/private/train.jsonl')
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=variables.PREFIX, env_nested_delimiter="__"
    )

    site: SiteSection
    model: ModelSection
    adapter: tuple[AdapterSection, ...] = Field(min_length=1)
    serve: tuple[ServeSection, ...] = ()
    engine: EngineSection
    slo: SloSection = SloSection()
    training: TrainingSection = TrainingSection()
    shadow: ShadowSection = ShadowSection()
    metrics: MetricsSection | None = None
    examples: ExamplesSection = ExamplesSection()

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = {"model.served_name": self.model.served_name}
        names |= {f"adapter.{number}.name": section.name for number, section in enumerate(self.adapter)}
        names |= {f"serve.{number}.name": section.name for number, section in enumerate(self.serve)}
        first: dict[str, str] = {}
        for where, name in names.items():
            if name in first:
                raise ValueError(
                    f"{first[name]} and {where} are both {name!r}; users could not tell them apart, so give one of "
                    "them another name"
                )
            first[name] = where
        return self

    @model_validator(mode="after")
    def _each_adapter_can_learn(self) -> Self:
        for number, section in enumerate(self.adapter):
            if section.data is None and self.training.data is None:
                raise ValueError(f"training.data is missing, and adapter.{number}.data, too: {section.name} needs one")
            if section.rank is not None and section.rank > self.engine.max_lora_rank:
                raise ValueError(
                    f"adapter.{number}.rank = {section.rank} is above engine.max_lora_rank = "
                    f"{self.engine.max_lora_rank}"
                )
            for guard in section.guard:
                if guard.name in {shared.name for shared in self.shadow.guard}:
                    raise ValueError(
                        f"adapter.{number}.guard and shadow.guard both have one called {guard.name!r}; a verdict could "
                        "not tell them apart"
                    )
        return self

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are trained here; users can ask for them."""
        return tuple(section.name for section in self.adapter)

    def section(self, adapter: str) -> AdapterSection:
        """Return the table of an adapter; raise NotFound where there is none of that name."""
        found = next((section for section in self.adapter if section.name == adapter), None)
        if found is None:
            raise NotFound(f"this site trains no adapter {adapter!r}; its operator can add an [[adapter]]")
        return found

    def data(self, adapter: str) -> Path:
        """Return the examples of an adapter."""
        found = self.section(adapter).data or self.training.data
        assert found is not None  # a validator has seen to it
        return found

    def eval_data(self, adapter: str) -> Path | None:
        """Return the held-out examples of an adapter; None where a part of its data is held out."""
        section = self.section(adapter)
        return section.eval_data or (None if section.data else self.training.eval_data)

    def policy(self, adapter: str) -> ShadowSection:
        """Return what a new version of an adapter must meet: [shadow], with the guards of both tables."""
        guards: tuple[GuardSection, ...] = (*self.shadow.guard, *self.section(adapter).guard)
        return self.shadow.model_copy(update={"guard": guards})

    def max_rank(self, adapter: str) -> int:
        """Return the largest rank that a version of an adapter may have here."""
        return self.section(adapter).rank or self.engine.max_lora_rank

    def trusted_key(self, adapter: str) -> Path | None:
        """Return the public key of the centre of an adapter's federation; None where any centre is trusted."""
        return self.section(adapter).trusted_key or self.site.trusted_key

    @property
    def slots(self) -> int:
        """The number of adapters that are on the device at a time, of which the base is one."""
        return self.engine.slots or max(5, 3 + len(self.adapter) + len(self.serve))

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
