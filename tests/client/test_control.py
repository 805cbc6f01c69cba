"""A site's control API: no input is answered with a 5xx, and a caller who waits is answered when there is news."""

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from client.control import control_api
from serving.user_example import Example
from tests.toys.deployment import BASE, SHAPES, Deployment, adapter, manifest_of
from tests.toys.schema import answers
from tests.toys.sites.no_rounds import NoRounds
from umbel.errors import NotFound
from umbel.messages import Hello, JobState, RoundReport

HELLO = Hello(
    site="clinic-a", adapters=("support",), fingerprint=BASE, shapes=SHAPES, dtype="float32", max_lora_rank=4,
    train_examples=1, eval_examples=1, live={"support": None},
)  # fmt: skip


async def status() -> dict[str, Any]:
    return {}


async def keep(example: Example) -> int:
    raise NotFound("this site keeps no examples")


def test_no_request_is_answered_with_a_server_error(tmp_path: Path) -> None:
    site = Deployment(tmp_path)  # no engine runs: a stored version would be found, and loading one would fail
    parts: Any = SimpleNamespace(
        config=site.config,
        deployer=site.deployer,
        jobs=NoRounds(),
        hello=lambda: HELLO,
        status=status,
        keep=keep,
        stopping=True,  # nobody is kept waiting
    )
    api = control_api(parts)
    manifest = base64.b64encode(manifest_of(1, adapter(1)).model_dump_json().encode()).decode()
    with asyncio.Runner() as runner:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://site")

        def send(**request: Any) -> httpx.Response:
            return runner.run(http.request(**request))

        asked = answers(api, [{}, {"x-umbel-manifest": manifest, "x-umbel-order": "e30="}], send=send)
        runner.run(http.aclose())
    assert len(asked) == 13, "every route"
    assert site.journal.versions() == []
    assert not (tmp_path / "adapters").exists()
    site.journal.close()


class Growing:
    """Jobs whose one round is done once it has been looked at `looks` times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def report(self, key: str) -> RoundReport:
        self.looks -= 1
        return RoundReport(key=key, state=JobState.RUNNING if self.looks > 0 else JobState.DONE, parent="p")


def asked(jobs: Growing, wait: str, *, stopping: bool = False) -> httpx.Response:
    """GET a round's report, with `wait`, as the ClientApp does."""
    parts: Any = SimpleNamespace(
        jobs=jobs, stopping=stopping, config=SimpleNamespace(site=SimpleNamespace(name="clinic-a"))
    )

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(control_api(parts))
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as http:
            return await http.get("/adapters/support/rounds/k", params={"wait": wait})

    return asyncio.run(ask())


def test_a_caller_who_waits_is_answered_when_the_round_ends() -> None:
    jobs = Growing(looks=4)
    assert asked(jobs, "20").json()["state"] == "done"
    assert jobs.looks == 0, "looked until it was done, and no more"


def test_a_caller_who_does_not_wait_gets_the_report_as_it_is() -> None:
    jobs = Growing(looks=4)
    assert asked(jobs, "0").json()["state"] == "running"
    assert jobs.looks == 3


def test_nobody_is_kept_waiting_by_a_site_that_stops() -> None:
    assert asked(Growing(looks=10**9), "20", stopping=True).json()["state"] == "running"


@pytest.mark.parametrize("wait", ["-1", "21", "soon"])
def test_a_wait_out_of_bounds_is_refused(wait: str) -> None:
    reply = asked(Growing(looks=1), wait)
    assert reply.status_code == 422
    assert "wait" in reply.json()["error"]["message"]
