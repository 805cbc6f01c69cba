"""`Site`: prepare the parts of a site's daemon and put them together."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from client import site_status
from client.adapter_bodies import AdapterBodies
from client.data import user_examples
from client.data.fresh import FreshData
from client.data.prepare import forget_others
from client.data.scrub import Scrubber
from client.data.scrub import load as load_scrubber
from client.held_base import HeldBase
from client.journal import Journal
from client.keys import SiteKeys
from client.tenant import Tenant, worths_here
from client.versions.background import Background
from client.versions.loading import Loading
from client.versions.serve_only import ServeOnly
from client.versions.served import Served
from serving.engine import require_free_port
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient, CoTrainerSettings, socket_path
from serving.user_example import Example
from umbel import peft_dir
from umbel.base.shapes import linear_shapes
from umbel.errors import NotFound
from umbel.faults import Point, reach
from umbel.messages import Hello
from umbel.site.check import check_files
from umbel.site.config import SiteConfig
from umbel.site.slow_dtype import slow_dtype

logger = logging.getLogger(__name__)


class Site:
    """The parts of a running daemon: journal, engine, and a tenant for each adapter."""

    def __init__(
        self, config: SiteConfig, base: HeldBase, fresh: Mapping[str, FreshData], scrub: Scrubber | None = None
    ) -> None:
        state_dir = config.site.state_dir
        self.config = config
        self.base = base
        self.scrub = scrub
        self.stopping = False
        """Set when the daemon ends: callers who wait for a report are answered at once."""
        self.shapes = linear_shapes(config.model.path, config.engine.target_modules)
        self.journal = Journal(state_dir / "journal.sqlite3")
        self.cotrainer = CoTrainerClient(socket_path(state_dir))
        self.served = Served(config, self.journal, self.shapes)
        self.supervisor = Supervisor(config, self.cotrainer, self.served)
        self.keys = SiteKeys(config.site)
        self.bodies = AdapterBodies(peft_dir.most_bytes(self.shapes, config.engine.max_lora_rank))
        self.background = Background()
        self.loading = Loading(config, self.supervisor, self.served, self.background)
        self._tenants = {
            name: Tenant(
                name,
                config=config,
                base=base,
                shapes=self.shapes,
                fresh=fresh[name],
                journal=self.journal,
                supervisor=self.supervisor,
                cotrainer=self.cotrainer,
                served=self.served,
                loading=self.loading,
                background=self.background,
            )
            for name in config.adapters
        }
        self.serve_only = ServeOnly(config, self.supervisor, self.served, self.loading, self.background)

    @classmethod
    async def prepare(cls, config: SiteConfig) -> "Site":
        """Read and check everything that can be wrong before an engine is started. Raises UmbelError."""
        await asyncio.to_thread(check_files, config)  # signals are answered meanwhile
        require_free_port(config.engine.host, config.engine.port)
        if slow := slow_dtype(config):
            logger.warning("engine.slow %s", slow)
        scrub = await asyncio.to_thread(load_scrubber) if config.examples.enabled else None
        base = await asyncio.to_thread(HeldBase.read, config.model.path, SiteKeys(config.site))
        await asyncio.to_thread(user_examples.prepare, config)
        forget_others(config.site.state_dir / "data", config.adapters)
        fresh = {name: await FreshData.begin(config, name) for name in config.adapters}
        CoTrainerSettings.of(config).write(config.site.state_dir)
        site = cls(config, base, fresh, scrub)
        await site.serve_only.apply_site_file()
        return site

    def resume(self) -> None:
        """Continue after a restart: damaged and left-over files go, versions without a verdict are judged.

        Call it before the engine is started.
        """
        self.served.forget_damaged()
        self.served.sweep()
        reach(Point.SWEPT)
        for tenant in self.tenants:
            tenant.deployer.resume()

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """The adapters that are trained here, in the order of the site file."""
        return tuple(self._tenants.values())

    def tenant(self, adapter: str) -> Tenant:
        """Return an adapter's part of the site; raise NotFound where it is not trained here."""
        self.config.section(adapter)
        return self._tenants[adapter]

    def hello(self, adapter: str) -> Hello:
        """Describe the site to the centre of one adapter: base, layers, numbers of examples, live, refused versions."""
        tenant = self._tenants.get(adapter)
        return Hello(
            site=self.config.site.name,
            adapter=adapter if tenant else None,
            fingerprint=self.base.fingerprint,
            kin=self.base.kin if self.base.packing else "",  # a dense one has it by its fingerprint
            packing=self.base.packing,
            shapes=self.shapes,
            dtype=self.config.engine.dtype,
            max_lora_rank=self.config.max_rank(adapter) if tenant else self.config.engine.max_lora_rank,
            train_examples=tenant.prepared.train_examples if tenant else 0,
            eval_examples=tenant.prepared.eval_examples if tenant else 0,
            data_changes=tenant.fresh.data.changes if tenant else 0,
            live=self.live(adapter) if tenant else None,
            refused=tuple(map(str, self.journal.refused(adapter))) if tenant else (),
        )

    def live(self, adapter: str) -> str | None:
        """Return the version of an adapter that answers its users; None while the base does."""
        version = self.journal.alias(adapter, "live")
        return str(version) if version else None

    async def keep(self, example: Example) -> int:
        """Keep a user's example; return its number. Raises NotFound if `[examples]` is off, Conflict if it is full."""
        if self.scrub is None:
            raise NotFound("this site keeps no examples; [examples].enabled is false")
        return await asyncio.to_thread(user_examples.keep, self.config, example, self.scrub)

    async def status(self) -> dict[str, Any]:
        """Return each adapter's live version, since when and why, its rounds, and how training stands, for JSON."""
        worths = worths_here(self.config, self.journal)
        return await site_status.report(self.config, self.tenants, worths, self.supervisor, self.served, self.cotrainer)
