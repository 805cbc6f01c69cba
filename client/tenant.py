"""`Tenant`: one adapter at a site, with its own data, rounds and versions. All of a site's tenants share one engine."""

from functools import partial

from client.data.fresh import FreshData
from client.data.prepare import Prepared
from client.held_base import HeldBase
from client.journal import Journal
from client.keys import SiteKeys
from client.rounds.jobs import Jobs
from client.rounds.measured import Measured
from client.rounds.personal import PersonalPart
from client.rounds.worth import brought, worths
from client.versions.background import Background
from client.versions.deployer import Deployer
from client.versions.loading import Loading
from client.versions.served import Served
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient
from umbel.peft_dir import Shapes, most_bytes
from umbel.site.config import SiteConfig


class Tenant:
    """The parts of a site that belong to one adapter. What one tenant does never waits for another one's rounds."""

    def __init__(
        self,
        name: str,
        *,
        config: SiteConfig,
        base: HeldBase,
        shapes: Shapes,
        fresh: FreshData,
        journal: Journal,
        supervisor: Supervisor,
        cotrainer: CoTrainerClient,
        served: Served,
        loading: Loading,
        background: Background,
    ) -> None:
        self.name = name
        self.fresh = fresh
        self._config = config
        self.keys = SiteKeys(config.site, config.trusted_key(name))
        self.jobs = Jobs(
            adapter=name,
            rounds=journal.rounds(name),
            supervisor=supervisor,
            cotrainer=cotrainer,
            fresh=fresh,
            base=base,
            shapes=shapes,
            max_rank=config.max_rank(name),
            personal=partial(PersonalPart, config, name),
            measured=partial(
                Measured,
                adapter=name,
                folder=config.site.state_dir / "worth" / name,
                everything=config.training.worth == "all",
                judged=partial(_judged, journal, name),
            ),
            directory=config.site.state_dir / "rounds" / name,
            keys=self.keys,
            share=lambda: self.share * worths_here(config, journal)[name],
            checkpoint_s=config.training.checkpoint_s,
            checkpoint_bytes=3 * most_bytes(shapes, config.engine.max_lora_rank),  # and AdamW's two moments
        )
        self.deployer = Deployer(
            name,
            config=config,
            journal=journal,
            served=served,
            supervisor=supervisor,
            loading=loading,
            background=background,
            jobs=self.jobs,
            base=base,
            shapes=shapes,
            keys=self.keys,
        )

    @property
    def prepared(self) -> Prepared:
        """The data that its next round and its next probe use."""
        return self.fresh.data.current

    @property
    def share(self) -> float:
        """The configured part of the training time, in proportion to that of the other adapters."""
        return self._config.section(self.name).share


def _judged(journal: Journal, adapter: str, lineage: str, round_: int) -> bool:
    """Tell whether the version that a round of a registry made came to this site."""
    every = (version.manifest for version in journal.versions(adapter=adapter))
    return any((manifest.lineage, manifest.round) == (lineage, round_) for manifest in every)


def worths_here(config: SiteConfig, journal: Journal) -> dict[str, float]:
    """Return the factor on each adapter's share now: how much its rounds have brought beside the others'."""
    return worths(
        {
            name: brought(journal.rounds(name), [(one.manifest, one.report) for one in journal.versions(adapter=name)])
            for name in config.adapters
        }
    )
