"""Hostile examples against the daemon: refused with the reason, not quoted, not stored; a good one is kept after."""

import asyncio
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from client.control import operator_api
from client.data.user_examples import ExampleStore
from client.site import Site
from tests.toys.engine import site_config
from tests.toys.hostile.catalogue import Hostile
from tests.toys.hostile.examples import EXAMPLES, given
from umbel.site.sections import ExamplesSection


@pytest.mark.parametrize("one", EXAMPLES, ids=lambda one: one.what)
def test_a_hostile_example_is_refused(tmp_path: Path, one: Hostile) -> None:
    config = site_config(tmp_path).model_copy(update={"examples": ExamplesSection(enabled=True)})
    site: Any = SimpleNamespace(config=config, scrub=str.upper)
    site.keep = partial(Site.keep, site)

    async def main() -> None:
        transport = httpx.ASGITransport(operator_api(site))
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as http:
            json = {"content-type": "application/json"}
            reply = await http.post("/examples", content=one.make(), headers=json)
            assert re.fullmatch(one.answer, str(reply.status_code)), reply.text
            assert re.search(one.says, reply.text), reply.text
            assert "POISON" not in reply.text
            assert ExampleStore.of(config).all() == []
            assert (await http.post("/examples", content=given(), headers=json)).json() == {"id": 1}

    asyncio.run(main())
