"""A site's parts together: its answer to the centre's hello, and examples where none are kept."""

import asyncio
from pathlib import Path

import pytest

from client.data.prepare import Prepared
from client.journal import TAKEN_BACK
from client.site import Site
from serving.user_example import Example
from tests.toys.deployment import BASE
from tests.toys.engine import site_config
from tests.toys.sites.journal import V1, V2, make_live
from umbel.errors import NotFound


@pytest.fixture
def site(tmp_path: Path, tiny_llama: Path) -> Site:
    config = site_config(tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": tiny_llama})})
    return Site(config, BASE, Prepared(tmp_path / "train.npy", tmp_path / "eval.npy", 10, 5, 50, 0, 0))


def test_hello_says_what_can_be_trained_here_and_what_answers(site: Site) -> None:
    hello = site.hello()
    assert (hello.site, hello.adapters, hello.fingerprint, hello.dtype) == ("clinic-a", ("support",), BASE, "float32")
    assert (hello.max_lora_rank, hello.train_examples, hello.eval_examples) == (4, 10, 5)
    assert (hello.live, hello.refused) == ({"support": None}, {"support": ()})
    for ref in (V1, V2):
        make_live(site.journal, ref)
    assert site.hello().live == {"support": "support@v2"}
    site.journal.make_base_live(V2, TAKEN_BACK)
    assert (site.hello().live, site.hello().refused) == ({"support": None}, {"support": ("support@v2",)})


def test_a_site_that_keeps_no_examples_says_so(site: Site) -> None:
    example = Example.model_construct()
    with pytest.raises(NotFound, match=r"\[examples\]\.enabled is false"):
        asyncio.run(site.keep(example))
