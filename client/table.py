"""The alias table that a site's journal stands for."""

from collections.abc import Container

from client.journal import Journal
from serving.aliases import AliasTable
from umbel.adapter import AdapterRef, Lifecycle
from umbel.config import SiteConfig
from umbel.messages import ShadowState


def alias_table(config: SiteConfig, journal: Journal, loaded: Container[AdapterRef]) -> AliasTable:
    """What every name means now. `loaded` are the versions in the running engine, which a journal cannot know.

    Users meet a shadow only while it is watched, and only where it is loaded: an engine that starts has no shadow.
    """
    adapters: dict[str, dict[str, str | None]] = {}
    watched: list[str] = []
    for section in config.adapter:
        shadows = [version for version in journal.versions(Lifecycle.SHADOW) if version.ref.name == section.name]
        aliases = {alias: journal.alias(section.name, alias) for alias in ("live", "previous")}
        aliases["shadow"] = shadows[-1].ref if shadows else None
        adapters[section.name] = {alias: str(ref) if ref else None for alias, ref in aliases.items()}
        if shadows and shadows[-1].report.state is ShadowState.WATCHING and shadows[-1].ref in loaded:
            watched.append(section.name)
    served = [adapters[name][alias] for name in adapters for alias in ("live", "previous")]
    policy = config.shadow
    return AliasTable.model_validate(
        {
            "base": config.model.served_name,
            "adapters": adapters,
            "addressable": [ref for ref in served if ref],
            "canary": {name: policy.canary_share for name in watched if policy.canary_share},
            "mirror": {name: policy.mirror_share for name in watched if policy.mirror_share},
        }
    )
