"""schemathesis against a site's control API: whatever is sent, no 5xx, nothing stored, and errors of one shape."""

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from client.control import control_api
from serving.user_example import Example
from tests.hostile.site.test_control import NoRounds
from tests.toys.deployment import BASE, SHAPES, Deployment, adapter, manifest_of
from tests.toys.schema import answers
from umbel.errors import NotFound
from umbel.messages import Hello

HELLO = Hello(
    site="clinic-a", adapters=("support",), fingerprint=BASE, shapes=SHAPES, dtype="float32", max_lora_rank=4,
    train_examples=1, eval_examples=1, live={"support": None},
)  # fmt: skip


async def status() -> dict[str, Any]:
    return {}


async def keep(example: Example) -> int:
    raise NotFound("this site keeps no examples")


def test_no_request_is_answered_with_a_server_error(tmp_path: Path) -> None:
    site = Deployment(tmp_path)  # nothing runs: what is stored would be there, and what is loaded would fail
    parts: Any = SimpleNamespace(
        config=site.config, deployer=site.deployer, jobs=NoRounds(), hello=lambda: HELLO, status=status, keep=keep
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
