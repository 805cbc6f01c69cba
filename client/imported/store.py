"""`ImportedStore`: the files of adapters that are only served, as the engine loads them; damaged ones are made anew."""

import logging
import time
from pathlib import Path

from client.imported import child
from client.imported.journal import Imported, ImportedJournal
from umbel import peft_dir
from umbel.adapter import ServedRef
from umbel.errors import AdapterError, NoRoom
from umbel.site.config import SiteConfig

logger = logging.getLogger(__name__)


class ImportedStore:
    """The folder `served` in a site's state directory: one folder for each adapter and digest."""

    def __init__(self, config: SiteConfig, journal: ImportedJournal, shapes: peft_dir.Shapes) -> None:
        self._config = config
        self._shapes = shapes
        self.journal = journal
        self._taken: dict[ServedRef, Imported] = {}
        """Adapters that were read since the daemon began; the journal has one once users can ask for it."""

    def directory(self, ref: ServedRef) -> Path:
        """Return the folder of an adapter; no other one has the same."""
        return self._config.site.state_dir / "served" / ref.folder_name

    def take(self, name: str, path: Path, *, listed: bool) -> Imported:
        """Read a PEFT directory and write it as the engine loads it; the journal does not know it yet.

        It waits for a child process, and touches nothing but files. Raises AdapterError, NoRoom.
        """
        engine = self._config.engine
        made = child.make(
            child.Order(
                name=name,
                path=path,
                shapes=dict(self._shapes),
                max_rank=engine.max_lora_rank,
                target_modules=engine.target_modules,
                dtype=engine.dtype,
                into=self._config.site.state_dir / "served",
            )
        )
        entry = Imported(name, made.digest, made.source, path, made.rank, listed, time.time())
        self._taken[entry.ref] = entry
        return entry

    def verify(self, entry: Imported) -> Path:
        """Return the folder of an adapter after checking every byte of it, and that this engine can load it.

        Raises AdapterError.
        """
        folder, engine = self.directory(entry.ref), self._config.engine
        try:
            weights = (folder / peft_dir.WEIGHTS).read_bytes()
            settings = (folder / peft_dir.CONFIG).read_bytes()
        except OSError as error:
            raise AdapterError(f"{folder}: cannot be read ({error.strerror}: {error.filename})") from error
        if peft_dir.digest(weights) != entry.digest:
            raise AdapterError(f"{folder / peft_dir.WEIGHTS}: changed or damaged")
        if settings != peft_dir.encode_settings(rank=entry.rank, target_modules=engine.target_modules, base=""):
            raise AdapterError(f"{folder / peft_dir.CONFIG}: damaged, or made for other [engine].target_modules")
        tensors = peft_dir.decode(weights)
        peft_dir.validate(tensors, self._shapes, rank=entry.rank, max_rank=engine.max_lora_rank)
        if any(str(array.dtype) != engine.dtype for array in tensors.values()):
            raise AdapterError(f"{folder}: not made for [engine].dtype = {engine.dtype!r}")
        return folder

    def verified(self, ref: ServedRef) -> Path:
        """Return the folder of an adapter that was taken, after `verify`. Raises AdapterError."""
        kept = self.journal.find(ref.name)
        entry = kept if kept is not None and kept.ref == ref else self._taken.get(ref)
        if entry is None:
            raise AdapterError(f"{ref} is not here")
        return self.verify(entry)

    def mend(self) -> list[str]:
        """Make adapters whose files do not verify anew from where they came, or forget them; say so in words."""
        done: list[str] = []
        for entry in self.journal.all():
            try:
                self.verify(entry)
            except AdapterError as damage:
                done.append(self._mended(entry, damage))
                logger.error("served.damaged %s", done[-1])
        return done

    def _mended(self, entry: Imported, damage: AdapterError) -> str:
        try:
            again = self.take(entry.name, entry.path, listed=entry.listed)
            if again.source != entry.source:
                raise AdapterError(f"{entry.path} holds another adapter now")
        except (AdapterError, NoRoom) as error:
            self.journal.remove(entry.name)
            back = "the next start reads it anew" if entry.listed else f"`umbel adapter load … {entry.name} PATH`"
            return f"{entry.ref} cannot be loaded ({damage}) nor made anew ({error}): it is not served; back: {back}"
        self.journal.put(again)
        return f"{entry.ref} could not be loaded ({damage}) and was made anew from {entry.path}"
