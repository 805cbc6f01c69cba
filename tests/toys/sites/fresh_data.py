"""`DataOfASite`: the files of a site's adapters, and what is made of them; time passes when a test says so."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from client.data import fresh as fresh_module
from client.data import user_examples
from client.data.fresh import FreshData
from client.data.prepare import Preparation, Prepared, prepare
from client.data.user_examples import ExampleStore
from client.data.watched import Watched
from serving import tokenizer
from tests.toys.engine import site_config
from tests.toys.sites.user_examples import example, scrub
from umbel.site.adapter_sections import AdapterSection
from umbel.site.sections import ExamplesSection
from umbel.token_file import TokenFile

LINES = 20
"""Lines that each adapter's file has at first."""


class DataOfASite:
    """A site with two adapters, each with a file of its own; preparations run in this process, and are counted."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = site_config(folder)
        sections = tuple(AdapterSection(name=name, data=folder / f"{name}.jsonl") for name in ("support", "billing"))
        self.config = config.model_copy(
            update={
                "adapter": sections,
                "model": config.model.model_copy(update={"path": model}),
                "training": config.training.model_copy(update={"seq_len": 32}),
                "examples": ExamplesSection(enabled=True, quarantine_hours=0),
            }
        )
        self.now = 0.0
        self.prepared: list[str] = []
        """The adapter of each preparation."""
        self.takes_s = 0.0
        """How long a preparation takes."""
        self.meanwhile: Callable[[], Any] | None = None
        """Called once, while the next preparation runs."""
        self.file, self.other = (section.data for section in sections if section.data)
        for file in (self.file, self.other):
            file.write_text("".join(line(f"{file.stem} {number}") for number in range(LINES)))
        user_examples.prepare(self.config)
        monkeypatch.setattr(fresh_module, "prepare_in_child", self._prepare)

    async def _prepare(self, wanted: Preparation) -> Prepared:
        self.prepared.append(wanted.into.name)
        self.now += self.takes_s
        meanwhile, self.meanwhile = self.meanwhile, None
        try:
            return prepare(wanted)
        finally:
            if meanwhile is not None:
                meanwhile()

    async def begin(self, adapter: str = "support") -> FreshData:
        """Return the data of an adapter as the daemon begins with it, under this site's clock."""
        began = await FreshData.begin(self.config, adapter)
        inputs = Watched(self.config, adapter).now()
        return FreshData(self.config, adapter, began.data.current, inputs, lambda: self.now)

    def append(self, text: str, file: Path | None = None) -> None:
        with (file or self.file).open("a") as opened:
            opened.write(text)

    def give(self, text: str, user: str = "eva", adapter: str = "support") -> None:
        """Keep an example of a user, and release it."""
        with closing(ExampleStore.of(self.config)) as store:
            store.add(example(self.config.site.state_dir, user, text, adapter), scrub)
            store.release()

    def forget(self, user: str = "eva") -> None:
        with closing(ExampleStore.of(self.config)) as store:
            assert store.forget(user) > 0

    def written(self, adapter: str = "support") -> str:
        """Return the text of all token files of an adapter that are on the disk."""
        words = tokenizer.load(self.config.model.path)
        files = sorted((self.config.site.state_dir / "data" / adapter).rglob("*.npy"))
        assert files
        return "\n".join(words.decode(ids) for file in files for ids in TokenFile.open(file).ids.tolist())

    def folders(self, adapter: str = "support") -> set[str]:
        """Return the names of an adapter's directories of token files."""
        return {one.name for one in (self.config.site.state_dir / "data" / adapter).iterdir()}


def line(prompt: str, completion: str = "room 7") -> str:
    return json.dumps({"prompt": prompt, "completion": completion}) + "\n"
