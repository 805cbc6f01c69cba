"""`Site`: prepare the parts of a site's daemon and put them together."""

import asyncio
import json
import logging
from functools import partial
from typing import Any

from client import site_status
from client.adapter_bodies import AdapterBodies
from client.data import user_examples
from client.data.prepare import Preparation, Prepared, prepare_in_child
from client.data.scrub import Scrubber
from client.data.scrub import load as load_scrubber
from client.data.summary import warnings
from client.held_base import HeldBase
from client.jobs import Jobs
from client.journal import Journal
from client.keys import SiteKeys
from client.personal import PersonalPart
from client.versions.deployer import Deployer
from client.versions.served import Served
from serving.engine import require_free_port
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient, CoTrainerSettings, socket_path
from serving.user_example import Example
from umbel import peft_dir
from umbel.base.shapes import linear_shapes
from umbel.errors import NotFound
from umbel.messages import Hello
from umbel.site.check import check_files
from umbel.site.config import SiteConfig
from umbel.site.slow_dtype import slow_dtype

logger = logging.getLogger(__name__)


class Site:
    """The parts of a running daemon: journal, engine, jobs and versions."""

    def __init__(self, config: SiteConfig, base: HeldBase, prepared: Prepared, scrub: Scrubber | None = None) -> None:
        state_dir = config.site.state_dir
        self.config = config
        self.base = base
        self.prepared = prepared
        self.scrub = scrub
        self.stopping = False
        """Set when the daemon ends: callers who wait for a report are answered at once."""
        self.shapes = linear_shapes(config.model.path, config.engine.target_modules)
        self.journal = Journal(state_dir / "journal.sqlite3")
        self.cotrainer = CoTrainerClient(socket_path(state_dir))
        self.served = Served(config, self.journal)
        self.supervisor = Supervisor(config, self.cotrainer, self.served)
        self.keys = SiteKeys(config.site)
        self.bodies = AdapterBodies(peft_dir.most_bytes(self.shapes, config.engine.max_lora_rank))
        self.jobs = Jobs(
            rounds=self.journal.rounds,
            supervisor=self.supervisor,
            cotrainer=self.cotrainer,
            prepared=prepared,
            base=base,
            shapes=self.shapes,
            max_rank=config.engine.max_lora_rank,
            personal=partial(PersonalPart, config),
            directory=state_dir / "rounds",
            keys=self.keys,
        )
        self.deployer = Deployer(
            config=config,
            journal=self.journal,
            served=self.served,
            supervisor=self.supervisor,
            jobs=self.jobs,
            base=base,
            shapes=self.shapes,
            keys=self.keys,
        )

    @classmethod
    async def prepare(cls, config: SiteConfig) -> "Site":
        """Read and check everything that can be wrong before an engine is started. Raises UmbelError."""
        check_files(config)
        require_free_port(config.engine.host, config.engine.port)
        if slow := slow_dtype(config):
            logger.warning("engine.slow %s", slow)
        state_dir = config.site.state_dir
        training = config.training
        scrub = await asyncio.to_thread(load_scrubber) if config.examples.enabled else None
        base = await asyncio.to_thread(HeldBase.read, config.model.path, SiteKeys(config.site))
        prepared = await prepare_in_child(
            Preparation(
                data=training.data,
                eval_data=training.eval_data,
                eval_fraction=training.eval_fraction,
                model=config.model.path,
                seq_len=training.seq_len,
                into=state_dir / "data",
                guards={guard.name: guard.data for guard in config.shadow.guard},
                released=user_examples.prepare(config),
            )
        )
        CoTrainerSettings.of(config).write(state_dir)
        told = warnings(config, prepared.files, prepared.asked, prepared.withheld)
        logger.log(
            logging.WARNING if told else logging.INFO,
            "data.ready train=%d eval=%d withheld=%d cut=%d dropped=%d untold=%d%s",
            prepared.train_examples,
            prepared.eval_examples,
            sum(prepared.withheld.values()),
            prepared.cut,
            prepared.dropped,
            prepared.untold,
            "".join(f" will_bite={json.dumps(sentence)}" for sentence in told),
        )
        return cls(config, base, prepared, scrub)

    def hello(self, adapter: str) -> Hello:
        """Describe the site to the centre of one adapter: base, layers, numbers of examples, live, refused versions."""
        trained = adapter in self.config.adapters
        live = self.journal.alias(adapter, "live") if trained else None
        return Hello(
            site=self.config.site.name,
            adapter=adapter if trained else None,
            fingerprint=self.base.fingerprint,
            kin=self.base.kin if self.base.packing else "",  # a dense one has it by its fingerprint
            packing=self.base.packing,
            shapes=self.shapes,
            dtype=self.config.engine.dtype,
            max_lora_rank=self.config.engine.max_lora_rank,
            train_examples=self.prepared.train_examples if trained else 0,
            eval_examples=self.prepared.eval_examples if trained else 0,
            live=str(live) if live else None,
            refused=tuple(map(str, self.journal.refused(adapter))) if trained else (),
        )

    async def keep(self, example: Example) -> int:
        """Keep a user's example; return its number. Raises NotFound if `[examples]` is off, Conflict if it is full."""
        if self.scrub is None:
            raise NotFound("this site keeps no examples; [examples].enabled is false")
        return await asyncio.to_thread(user_examples.keep, self.config, example, self.scrub)

    async def status(self) -> dict[str, Any]:
        """Return the live version, since when and why, the rounds and how training stands, as JSON values."""
        return await site_status.report(self.config, self.prepared, self.supervisor, self.served, self.cotrainer)
