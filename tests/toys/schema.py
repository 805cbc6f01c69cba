"""`answers`: sends an API the requests that schemathesis draws from its OpenAPI schema, in this process."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install -e '.[dev]'")


Send = Callable[..., Any]
"""Sends a request as `requests.request` does and returns the answer; for applications that need one thread."""


def answers(
    api: FastAPI, headers: Sequence[Mapping[str, str]], *, examples: int = 25, send: Send | None = None
) -> dict[str, int]:
    """Assert that no answer is a 5xx and that all errors have one shape; return the number of requests of each route.

    Each request is sent once for each of `headers`; schemathesis draws `examples` requests for each route.
    """
    schema = schemathesis.openapi.from_dict(api.openapi())
    schema.app = api
    asked: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(operation.as_strategy())
        def once(case: Any) -> None:
            for more in headers:
                reply = case.call(headers=dict(more)) if send is None else send(**_plain(case, more))
                assert reply.status_code < 500, (case, reply.text)
                if reply.status_code >= 400 and case.method != "HEAD":
                    assert set(reply.json()["error"]) == {"type", "message"}, (case, reply.text)
                route = case.operation.label
                asked[route] = asked.get(route, 0) + 1

        once()
    return asked


def _plain(case: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    given = case.as_transport_kwargs(base_url="http://site", headers=dict(headers))
    named = {key: given[key] for key in ("method", "url", "headers", "params", "json") if given.get(key) is not None}
    return {**named, **({"content": given["data"]} if given.get("data") else {})}
