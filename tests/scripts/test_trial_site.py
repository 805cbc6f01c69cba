"""The trial site: its site file loads, its adapters are told apart, and what the site refuses is an error."""

import base64
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from scripts.tools.processes import ProcessError
from scripts.tools.trial_site import LENIENT, RANK, TrialSite, random_adapter, require_done, wait_until
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.site.config import SiteConfig


def answered(site: TrialSite, answer: Callable[[httpx.Request], httpx.Response]) -> list[httpx.Request]:
    """Let a function answer in the site's place; the requests are kept."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer(request)

    site.control = site.operator = httpx.Client(transport=httpx.MockTransport(handle), base_url="http://site")
    return asked


def test_its_file_loads_with_what_the_test_adds(tiny_llama: Path, tmp_path: Path) -> None:
    site = TrialSite(tmp_path, tiny_llama, "b", extra=LENIENT)
    config = SiteConfig.load(site.file)
    assert (config.site.name, config.engine.port, config.engine.max_lora_rank) == ("b", site.port, RANK)
    assert config.shadow.max_loss_ratio == 100.0
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 40


def test_an_adapter_is_the_seeds_and_fits_the_base(tiny_llama: Path) -> None:
    one, again, other = (random_adapter(tiny_llama, seed) for seed in (1, 1, 2))
    assert one == again != other
    tensors = peft_dir.decode(one)
    peft_dir.validate(tensors, linear_shapes(tiny_llama, LINEARS), rank=RANK, max_rank=RANK)
    unchanged = peft_dir.decode(random_adapter(tiny_llama, 1, b_std=0.0))
    assert not any(array.any() for name, array in unchanged.items() if ".lora_B." in name)


def test_a_version_is_offered_and_its_verdict_awaited(tiny_llama: Path, tmp_path: Path) -> None:
    site, blob = TrialSite(tmp_path, tiny_llama), random_adapter(tiny_llama, 1)
    states = iter(["validating", "probing", "judged"])
    asked = answered(
        site,
        lambda request: httpx.Response(200, json={} if request.method == "POST" else {"state": next(states)}),
    )
    assert site.offer(7, blob) == AdapterRef("support", 7)
    push, *polls = asked
    assert (push.url.path, push.content) == ("/adapters/support/shadow", blob)
    manifest = AdapterManifest.model_validate_json(base64.b64decode(push.headers["x-umbel-manifest"]))
    assert (manifest.ref, manifest.digest) == (AdapterRef("support", 7), peft_dir.digest(blob))
    assert [poll.url.path for poll in polls] == ["/adapters/support@v7/shadow"] * 3


def test_a_version_that_the_site_refuses_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    site = TrialSite(tmp_path, tiny_llama)
    answered(site, lambda _: httpx.Response(422, text="rank 99"))
    with pytest.raises(ProcessError, match="/adapters/support/shadow: rank 99"):
        site.offer(1, random_adapter(tiny_llama, 1))
    require_done(httpx.Response(200))


def test_it_has_not_started_while_nobody_answers(tiny_llama: Path, tmp_path: Path) -> None:
    site = TrialSite(tmp_path, tiny_llama)
    assert site.starts() == 0
    with pytest.raises(httpx.TransportError):
        site.status()
    answered(site, lambda _: httpx.Response(200, json={
        "engine": {"ready": True, "starts": 2}, "aliases": {"support": {"live": None}}}))  # fmt: skip
    assert (site.starts(), site.live()) == (2, "base")


def test_waiting_gives_the_first_true_value_and_has_an_end() -> None:
    values = iter([None, 0, "x"])
    assert wait_until(lambda: next(values), "a value") == "x"
    with pytest.raises(ProcessError, match="a value: not within 0 s"):
        wait_until(lambda: None, "a value", 0.1)
