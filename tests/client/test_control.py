"""A site's control API: two tables of routes, no input is answered with a 5xx, and news to a caller who waits."""

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from client import control
from client.adapter_bodies import AdapterBodies
from client.control import GROUP, OPERATOR, group_api, operator_api
from client.keys import SiteKeys
from serving.user_example import Example
from tests.toys.deployment import BASE, SHAPES, Deployment, adapter, manifest_of
from tests.toys.schema import answers
from umbel.errors import NotFound
from umbel.messages import Hello, JobState, RoundOrder, RoundReport, TrainPlan

HELLO = Hello(
    site="clinic-a", adapter="support", fingerprint=BASE, shapes=SHAPES, dtype="float32", max_lora_rank=4,
    train_examples=1, eval_examples=1,
)  # fmt: skip


async def status() -> dict[str, Any]:
    return {}


async def keep(example: Example) -> int:
    raise NotFound("this site keeps no examples")


CLIENT_APP = {
    "GET /hello", "POST /adapters/{name}/rounds/{key}", "GET /adapters/{name}/rounds/{key}",
    "GET /adapters/{name}/rounds/{key}/update", "POST /adapters/{name}/shadow", "GET /adapters/{ref}/shadow",
    "POST /adapters/{ref}/promote", "POST /adapters/{ref}/discard", "POST /adapters/{name}/rollback",
    "POST /adapters/{name}/restore",
}  # fmt: skip
"""What the group may ask, and code that the centre sends with it; see client/flower/app.py."""
OPERATORS = {
    "GET /status", "POST /adapters/{ref}/promote", "POST /adapters/{name}/rollback",
    "DELETE /adapters/{name}/rounds/{key}", "POST /examples", "POST /served/{name}", "DELETE /served/{name}",
}  # fmt: skip


def routes(table: APIRouter) -> dict[str, set[str]]:
    """Route → its query parameters."""
    found = [route for route in table.routes if isinstance(route, APIRoute)]
    assert len(found) == len(table.routes)
    return {
        f"{method} {one.path}": {parameter.name for parameter in one.dependant.query_params}
        for one in found for method in one.methods
    }  # fmt: skip


def test_each_socket_has_its_routes_and_not_one_more() -> None:
    assert routes(GROUP).keys() == CLIENT_APP
    assert routes(OPERATOR).keys() == OPERATORS
    assert set().union(*routes(GROUP).values()) == {"adapter", "wait", "nonce", "ref", "instead_of"}, (
        "nothing is forced"
    )
    assert {route for route, query in routes(OPERATOR).items() if "forced" in query} == {
        "POST /adapters/{ref}/promote", "POST /adapters/{name}/rollback",
    }  # fmt: skip
    for table, api in ((GROUP, group_api), (OPERATOR, operator_api)):
        paths: dict[str, Any] = api(Any).openapi()["paths"]
        served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
        assert served == routes(table).keys(), "and nothing beside the table"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/adapters/support@v1/promote?forced=true"), ("POST", "/adapters/support@v1/promote?forced=false"),
        ("POST", "/adapters/support@v1/promote?Forced=1"), ("POST", "/adapters/support/rollback?forced=true"),
        ("POST", "/adapters/support@v1/discard?forced=true"), ("GET", "/status"), ("POST", "/examples"),
        ("DELETE", "/adapters/support/rounds/k"), ("GET", "/hello?name=other"),
        ("POST", "/served/legal?path=/srv/legal"),
    ],
)  # fmt: skip
def test_what_is_the_operators_is_not_there_for_the_group(method: str, path: str, tmp_path: Path) -> None:
    site = Deployment(tmp_path)
    with asyncio.Runner() as runner:
        reply = runner.run(site.http().request(method, path))
    assert reply.status_code == (405 if method == "DELETE" else 404), reply.text
    assert set(reply.json()["error"]) == {"type", "message"}
    site.journal.close()


def test_no_request_is_answered_with_a_server_error(tmp_path: Path) -> None:
    site = Deployment(tmp_path)  # no engine runs: a stored version would be found, and loading one would fail
    parts: Any = SimpleNamespace(
        config=site.config,
        tenant=site.tenant,
        tenants=site.config.adapters,
        live=lambda adapter: None,
        hello=lambda adapter: HELLO,
        bodies=AdapterBodies(1 << 20),
        status=status,
        keep=keep,
        serve_only=site.serve_only,
        keys=SiteKeys(site.config.site),
        stopping=True,  # nobody is kept waiting
    )
    manifest = base64.b64encode(manifest_of(1, adapter(1)).model_dump_json().encode()).decode()
    for api, table in ((group_api(parts), CLIENT_APP), (operator_api(parts), OPERATORS)):
        with asyncio.Runner() as runner:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://site")

            def send(runner: asyncio.Runner = runner, http: httpx.AsyncClient = http, **request: Any) -> httpx.Response:
                return runner.run(http.request(**request))

            asked = answers(api, [{}, {"x-umbel-manifest": manifest, "x-umbel-order": "e30="}], send=send)
            runner.run(http.aclose())
        assert asked.keys() == table
    assert site.journal.versions() == []
    assert not (tmp_path / "adapters").exists()
    site.journal.close()


class Growing:
    """Jobs whose one round is done once it has been looked at `looks` times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.parents: list[bytes] = []

    def submit(self, order: RoundOrder, parent: bytes, signature: str) -> None:
        self.parents.append(parent)

    async def supersede(self, order: RoundOrder) -> None:
        pass

    def report(self, key: str) -> RoundReport:
        self.looks -= 1
        return RoundReport(key=key, state=JobState.RUNNING if self.looks > 0 else JobState.DONE, parent="p")


def asked(
    jobs: Growing, wait: str, *, order: RoundOrder | None = None, stopping: bool = False, tenants: int = 1
) -> httpx.Response:
    """GET a round's report, or POST its order, with `wait`, as the ClientApp does."""
    keys = SimpleNamespace(require=lambda document, signature: None)
    support = SimpleNamespace(jobs=jobs, keys=keys)
    parts: Any = SimpleNamespace(
        tenant={"support": support}.__getitem__, tenants=(support,) * tenants, stopping=stopping,
        live=lambda adapter: f"{adapter}@v7", bodies=AdapterBodies(1 << 20),
        config=SimpleNamespace(site=SimpleNamespace(name="clinic-a")),
    )  # fmt: skip

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(group_api(parts))
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as http:
            if order is None:
                return await http.get("/adapters/support/rounds/k", params={"wait": wait})
            said = base64.b64encode(order.model_dump_json().encode()).decode()
            return await http.post(
                "/adapters/support/rounds/k", params={"wait": wait}, headers={"x-umbel-order": said}, content=b"parent"
            )

    return asyncio.run(ask())


def order(seconds: float) -> RoundOrder:
    return RoundOrder(key="k", base="b", parent="p", round=1, plan=TrainPlan(rank=2, steps=3, seconds=seconds))


def test_a_caller_who_waits_is_answered_when_the_round_ends() -> None:
    jobs = Growing(looks=4)
    assert asked(jobs, "20").json()["state"] == "done"
    assert jobs.looks == 0, "looked until it was done, and no more"


def test_a_caller_who_does_not_wait_gets_the_report_as_it_is() -> None:
    jobs = Growing(looks=4)
    assert asked(jobs, "0").json()["state"] == "running"
    assert jobs.looks == 3


def test_who_gives_an_order_is_answered_when_the_round_ends_with_the_version_that_is_live() -> None:
    jobs = Growing(looks=4)
    report = asked(jobs, "20", order=order(seconds=20)).json()
    assert (report["state"], report["live"], jobs.looks, jobs.parents) == ("done", "support@v7", 0, [b"parent"])


@pytest.mark.parametrize(
    ("how", "looks"),
    [({"order": order(seconds=0.3)}, 3), ({"tenants": 2}, 5), ({"tenants": 2, "order": order(seconds=60)}, 5)],
)
def test_an_order_is_held_no_longer_than_its_round_and_nothing_for_long_where_federations_share_the_site(
    how: dict[str, Any], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SHARED_WAIT_S", 0.5)
    jobs = Growing(looks=10**9)
    assert asked(jobs, "20", **how).json()["state"] == "running"
    assert 1 < 10**9 - jobs.looks <= looks + 1, "one look every tenth of a second"


def test_nobody_is_kept_waiting_by_a_site_that_stops() -> None:
    assert asked(Growing(looks=10**9), "20", stopping=True).json()["state"] == "running"


@pytest.mark.parametrize("wait", ["-1", "21", "soon"])
def test_a_wait_out_of_bounds_is_refused(wait: str) -> None:
    reply = asked(Growing(looks=1), wait)
    assert reply.status_code == 422
    assert "wait" in reply.json()["error"]["message"]
