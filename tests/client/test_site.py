"""A site's parts together: its answer to the centre's hello, and examples where none are kept."""

import asyncio
import json
import logging
from pathlib import Path

import pytest

from client.data.fresh import FreshData
from client.data.prepare import Preparation, Prepared, prepare
from client.journal import TAKEN_BACK
from client.site import Site
from scripts.tools.processes import free_port
from serving.user_example import Example
from tests.toys.deployment import BASE, HELD_BASE
from tests.toys.engine import site_config
from tests.toys.sites.journal import V1, V2, make_live
from umbel.errors import NotFound
from umbel.site import slow_dtype


@pytest.fixture
def site(tmp_path: Path, tiny_llama: Path) -> Site:
    config = site_config(tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": tiny_llama})})
    prepared = Prepared(tmp_path / "train.npy", tmp_path / "eval.npy", 10, 5, 50)
    return Site(config, HELD_BASE, {"support": FreshData(config, "support", prepared)})


def test_hello_says_what_can_be_trained_here_and_what_answers(site: Site) -> None:
    hello = site.hello("support")
    assert (hello.site, hello.adapter, hello.fingerprint, hello.dtype) == ("clinic-a", "support", BASE, "float32")
    assert (hello.kin, hello.packing) == ("", ""), "a dense base has its kin by its fingerprint"
    assert (hello.max_lora_rank, hello.train_examples, hello.eval_examples) == (4, 10, 5)
    assert (hello.live, hello.refused) == (None, ())
    for ref in (V1, V2):
        make_live(site.journal, ref)
    assert site.hello("support").live == "support@v2"
    site.journal.make_base_live(V2, TAKEN_BACK)
    assert (site.hello("support").live, site.hello("support").refused) == (None, ("support@v2",))


def test_hello_says_nothing_of_another_adapter(site: Site) -> None:
    """Two federations may share a site: a centre hears of its own adapter, and of no other one, not even the name."""
    make_live(site.journal, V1)
    site.journal.make_base_live(V1, TAKEN_BACK)
    for asked in ("billing", "a"):
        hello = site.hello(asked)
        assert (hello.adapter, hello.live, hello.refused) == (None, None, ())
        assert (hello.train_examples, hello.eval_examples) == (0, 0)
        assert "support" not in hello.model_dump_json()


@pytest.fixture
def prepared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare data in this process, which has transformers already; test_prepare.py has the child process."""

    async def here(wanted: Preparation) -> Prepared:
        return prepare(wanted)

    monkeypatch.setattr("client.data.fresh.prepare_in_child", here)


@pytest.mark.usefixtures("prepared_here")
@pytest.mark.parametrize(("flags", "slow"), [("avx2 avx512f", True), ("avx2 avx512_bf16", False)])
def test_a_cpu_that_emulates_the_number_format_is_named_before_the_engine_starts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    flags: str, slow: bool,
) -> None:  # fmt: skip
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(slow_dtype, "CPUINFO", tmp_path / "cpuinfo")
    engine = site.config.engine.model_copy(update={"dtype": "bfloat16", "device": "cpu", "port": free_port()})
    lines = [json.dumps({"prompt": f"ward {number}", "completion": "room"}) for number in range(20)]
    site.config.training.data.write_text("\n".join(lines))
    asyncio.run(Site.prepare(site.config.model_copy(update={"engine": engine})))
    assert ("engine.slow [engine].dtype is bfloat16" in caplog.text) == slow


@pytest.mark.usefixtures("prepared_here")
def test_data_that_will_bite_is_one_warning_with_its_remedy_in_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    engine = site.config.engine.model_copy(update={"port": free_port()})
    config = site.config.model_copy(update={"engine": engine})
    for count, level in ((600, logging.INFO), (20, logging.WARNING)):
        lines = [json.dumps({"prompt": f"ward {number}", "completion": "room"}) for number in range(count)]
        config.training.data.write_text("\n".join(lines))
        with caplog.at_level(logging.INFO):
            ready_site = asyncio.run(Site.prepare(config))
            ready_site.journal.close()
        assert ready_site.base.kin == ready_site.base.fingerprint.kin, "a dense base is its own origin"
        (ready,) = [record for record in caplog.records if record.getMessage().startswith("data.ready ")]
        assert ready.levelno == level
        assert ("will_bite=" in ready.getMessage()) == (level == logging.WARNING)
        caplog.clear()
    assert "are fewer than [shadow].min_examples = 30" in ready.getMessage()


def test_a_site_that_keeps_no_examples_says_so(site: Site) -> None:
    example = Example.model_construct()
    with pytest.raises(NotFound, match=r"\[examples\]\.enabled is false"):
        asyncio.run(site.keep(example))
