"""`Site`: the parts of a site's daemon, put together."""

import asyncio
import logging
from functools import partial
from typing import Any

from client import site_status
from client.data import user_examples
from client.data.prepare import Prepared, prepare_in_child
from client.data.scrub import Scrubber
from client.data.scrub import load as load_scrubber
from client.jobs import Jobs
from client.journal import Journal
from client.keys import SiteKeys
from client.personal import PersonalPart
from client.versions.deployer import Deployer
from serving.engine import require_free_port
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient, CoTrainerSettings, socket_path
from serving.user_example import Example
from umbel.base import BaseFingerprint, linear_shapes
from umbel.config import SiteConfig
from umbel.errors import NotFound
from umbel.messages import Hello
from umbel.site_check import check_files

logger = logging.getLogger(__name__)


class Site:
    """The parts of a daemon, put together."""

    def __init__(
        self, config: SiteConfig, fingerprint: BaseFingerprint, prepared: Prepared, scrub: Scrubber | None = None
    ) -> None:
        state_dir = config.site.state_dir
        self.config = config
        self.fingerprint = fingerprint
        self.prepared = prepared
        self.scrub = scrub
        self.shapes = linear_shapes(config.model.path, config.engine.target_modules)
        self.journal = Journal(state_dir / "journal.sqlite3")
        self.cotrainer = CoTrainerClient(socket_path(state_dir))
        self.supervisor = Supervisor(config, self.cotrainer, lambda: self.deployer.what_to_serve())
        keys = SiteKeys(config.site)
        self.jobs = Jobs(
            self.journal,
            self.supervisor,
            self.cotrainer,
            prepared,
            fingerprint,
            self.shapes,
            config.engine.max_lora_rank,
            partial(PersonalPart, config),
            state_dir / "rounds",
            keys,
        )
        self.deployer = Deployer(config, self.journal, self.supervisor, self.jobs, fingerprint, self.shapes, keys)

    @classmethod
    async def prepare(cls, config: SiteConfig) -> "Site":
        """Read and check everything that can be wrong before an engine is started."""
        check_files(config)
        require_free_port(config.engine.host, config.engine.port)
        state_dir = config.site.state_dir
        training = config.training
        scrub = await asyncio.to_thread(load_scrubber) if config.examples.enabled else None
        fingerprint = await asyncio.to_thread(BaseFingerprint.of, config.model.path)
        prepared = await prepare_in_child(
            training.data,
            training.eval_data,
            training.eval_fraction,
            config.model.path,
            training.seq_len,
            state_dir / "data",
            {guard.name: guard.data for guard in config.shadow.guard},
            user_examples.prepare(config),
        )
        settings = CoTrainerSettings(
            max_rank=config.engine.max_lora_rank,
            target_modules=config.engine.target_modules,
            micro_batch=training.micro_batch,
            seq_len=training.seq_len,
            memory_mb=training.memory_mb,
            share_floor=training.share_floor,
            share_cap=training.share_cap,
            **config.slo.model_dump(),
        )
        settings.write(state_dir)
        logger.info(
            "data.ready train=%d eval=%d cut=%d dropped=%d",
            prepared.train_examples,
            prepared.eval_examples,
            prepared.cut,
            prepared.dropped,
        )
        return cls(config, fingerprint, prepared, scrub)

    def hello(self) -> Hello:
        names = self.config.adapters
        live = {name: self.journal.alias(name, "live") for name in names}
        return Hello(
            site=self.config.site.name,
            adapters=names,
            fingerprint=self.fingerprint,
            shapes=self.shapes,
            dtype=self.config.engine.dtype,
            max_lora_rank=self.config.engine.max_lora_rank,
            train_examples=self.prepared.train_examples,
            eval_examples=self.prepared.eval_examples,
            live={name: str(ref) if ref else None for name, ref in live.items()},
            refused={name: tuple(map(str, self.journal.refused(name))) for name in names},
        )

    async def keep(self, example: Example) -> int:
        """Keep what a user gave; its number. Raises NotFound where `[examples]` is off, Conflict where it is enough."""
        if self.scrub is None:
            raise NotFound("this site keeps no examples; [examples].enabled is false")
        return await asyncio.to_thread(user_examples.keep, self.config, example, self.scrub)

    async def status(self) -> dict[str, Any]:
        """What an operator asks: which version answers, since when and why, what is waiting, how training stands."""
        return await site_status.report(self.config, self.supervisor, self.deployer, self.cotrainer)
