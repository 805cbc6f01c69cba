"""Every field that the pinned SGLang parses on a user's route, or that a client can send there, is classified."""

import json
import subprocess
import sys
import typing
from typing import Any

import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.responses.response_create_params
import pytest

from serving.router.fields.routes import REFUSED, ROUTES, checked
from umbel.errors import RequestRefused

WALK = """
import json
from fastapi.params import Depends
from pydantic import BaseModel
from sglang.srt.entrypoints.http_server import app

def walk(routes):
    for route in routes:
        if getattr(route, "methods", None) and hasattr(route, "dependant"):
            yield route
        else:
            included = getattr(route, "original_router", None) or getattr(route, "app", None)
            yield from walk(getattr(included, "routes", []))

found = {}
for route in walk(app.routes):
    models = [one.field_info.annotation for one in route.dependant.body_params]
    for model in models:
        if isinstance(model, type) and issubclass(model, BaseModel):
            named = {name: field.alias or name for name, field in model.model_fields.items()}
            found[route.path] = {"model": model.__name__, "fields": sorted(set(named.values()))}
print("fields:", json.dumps(found))
"""


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, Any]]:
    """Path → the request model of the installed SGLang; a process of its own imports it, as it changes transformers."""
    said = subprocess.run([sys.executable, "-c", WALK], check=True, capture_output=True, text=True).stdout
    line = next(line for line in said.splitlines() if line.startswith("fields: "))
    found: dict[str, dict[str, Any]] = json.loads(line.removeprefix("fields: "))
    return found


def test_every_field_of_every_users_route_is_taken_dropped_or_refused_with_a_reason(
    models: dict[str, dict[str, Any]],
) -> None:
    assert models["/v1/chat/completions"]["model"] == "ChatCompletionRequest"
    assert set(ROUTES) <= set(models), "the walk has found each route's model"
    for path, route in ROUTES.items():
        fields = set(models[path]["fields"])
        assert len(fields) >= 15, path
        known = {"model"} | set(route.fields) | route.dropped | set(REFUSED)
        assert fields <= known, f"{path}: classify {sorted(fields - known)}"


def test_a_field_that_a_route_takes_is_one_that_sglang_has(models: dict[str, dict[str, Any]]) -> None:
    for path, route in ROUTES.items():
        forwarded = set(route.fields) - route.dropped - {"priority"}  # the router keeps it for itself
        assert forwarded <= set(models[path]["fields"]), path


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/v1/chat/completions", openai.types.chat.completion_create_params.CompletionCreateParamsBase),
        ("/v1/completions", openai.types.completion_create_params.CompletionCreateParamsBase),
        ("/v1/responses", openai.types.responses.response_create_params.ResponseCreateParamsBase),
        ("/v1/messages", anthropic.types.message_create_params.MessageCreateParamsBase),
    ],
)
def test_every_parameter_of_the_clients_is_taken_dropped_or_refused_with_a_reason(path: str, parameters: type) -> None:
    fields = set(typing.get_type_hints(parameters))
    known = {"model"} | set(ROUTES[path].fields) | ROUTES[path].dropped | set(REFUSED)
    assert len(fields) >= 15
    assert fields <= known, f"{path}: classify {sorted(fields - known)}"


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path in ROUTES for field in REFUSED if field not in ROUTES[path].fields]
)
def test_what_is_refused_is_refused_whatever_it_says_unless_it_is_null(path: str, field: str) -> None:
    assert checked(path, {"model": "tiny", field: None}, 512) == {"model": "tiny"}
    for value in (0, 1, False, True, "", "x", [], {}, [0]):
        with pytest.raises(RequestRefused, match=f"'{field}' cannot be chosen here") as refused:
            checked(path, {"model": "tiny", field: value}, 512)
        assert refused.value.field == field
