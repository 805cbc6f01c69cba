"""The page of every HTTP route: the users' of the router, the site's control API, the registry's API."""

import typing
from collections.abc import Iterable, Mapping

from fastapi import Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

import client.control
import server.registry.api
import server.registry.metrics
from scripts.tools.reference.page import code, head, table
from serving.priorities import CLASSES
from serving.router import consent, feedback, router
from umbel.errors import UmbelError

INTRODUCTION = """
Three servers answer HTTP: the engine answers users, a site's daemon answers its ClientApp and, on another socket, its
operator, and the centre may serve its registry.
"""
OPENAI = "Answer with tokens, as OpenAI's API does; `model` names the base, an adapter or a version."
USERS = {
    "/v1/chat/completions": OPENAI,
    "/v1/completions": OPENAI,
    "/v1/responses": OPENAI,
    "/v1/messages": "Answer with tokens, as Anthropic's API does; `model` names the base, an adapter or a version.",
    router.FEEDBACK: f"Rate an answer ({', '.join(map(code, feedback.Feedback.model_fields))}); 404 for one that is "
    "not remembered.",
    consent.EXAMPLES: "Give an answer to be trained on, with `[examples]` only: "
    f"{', '.join(map(code, consent.Offer.model_fields))}, and the header `x-umbel-consent: train`.",
}
"""Routes that users POST to."""
ASKED = {
    "/v1/models": "List the models that can be asked for: the base, every adapter, every version that is loaded.",
    "/v1/models/{name}": "Describe one model; `umbel_adapter` names the version that answers for it.",
    "/metrics": "SGLang's own metrics, with `enable_metrics = true` in `[engine.extra_args]`.",
    "/ready": "200 when the engine answers and knows its aliases, 503 before.",
    "/health": "200 while the engine's HTTP process is alive.",
    "/health_generate": "200 when the engine can generate a token.",
}
"""Routes that users GET."""


def render() -> str:
    """Return the whole page."""
    page = head("HTTP", "`serving/router/`, `client/control.py` and `server/registry/api.py`") + INTRODUCTION
    return page + _users() + _control() + _registry()


def _users() -> str:
    """Write the users' routes; fail when the router has one that is not described here, or lacks one that is."""
    assert set(USERS) == router.GENERATING | {router.FEEDBACK, consent.EXAMPLES}, "describe each route of the router"
    assert set(ASKED) >= router.OPEN, "describe each open route of the router"
    posted = [(code(f"POST {path}"), meaning) for path, meaning in USERS.items()]
    asked = [(code(f"GET {path}"), meaning) for path, meaning in ASKED.items()]
    classes = " or ".join(code(f'"{name}"') for name in CLASSES)
    return f"""
## Users: the engine's port

Where the site file names [files of keys](../security.md#users-keys) users send one of theirs (`Authorization: Bearer
KEY` or `x-api-key: KEY`), except to {", ".join(map(code, sorted(router.OPEN)))}. An adapter that a key does not
open is 404 in all routes, as one that does not exist. Any other route is 404. The answer's header `x-umbel-adapter`
names the version that answered. `priority` in the body is {classes}. Errors have OpenAI's
form, and Anthropic's on `/v1/messages`. Any other field of a body than
[those of the usual clients](../how-to/use-openai-clients.md) is 400.

{table(("route", "meaning"), [*posted, *asked])}"""


def _control() -> str:
    return f"""
## A site's control API: two Unix sockets

Answers are the messages of `umbel/messages/`, as JSON. A query parameter that a route does not have is refused, 404.

On `[site].socket`, for the ClientApp, and for whoever else may open it; what is not here cannot be asked there. A
request whose body is an adapter (safetensors bytes) carries its message in a header, as base64 of JSON, and the
centre's signature in `x-umbel-signature`. With a `nonce` the answer is signed with `[site].signing_key`.

{_table(client.control.GROUP.routes)}

On `operator.sock` in `state_dir`, for the daemon's own user only: what `umbel status`, `umbel promote`,
`umbel rollback`, `umbel adapter load` and `umbel adapter unload` ask, and the engine.

{_table(client.control.OPERATOR.routes)}

{_errors(client.control.STATUS)}"""


def _registry() -> str:
    routes = [*server.registry.api.routes.routes, *server.registry.metrics.routes.routes]
    return f"""
## The registry: `umbel registry serve`

Reading needs no key; a change (POST) needs `authorization: Bearer TOKEN`, and a server with `--token-file`. A change
has a JSON body: {", ".join(map(code, server.registry.api.Change.model_fields))}, of which `why` is required.

{_table(routes)}
{_errors(server.registry.api.STATUS)}"""


def _table(routes: Iterable[BaseRoute]) -> str:
    return table(("route", "query", "answer", "meaning"), [_row(one) for one in routes if isinstance(one, APIRoute)])


def _row(route: APIRoute) -> tuple[str, str, str, str]:
    told = (route.endpoint.__doc__ or "").strip().partition("\n")[0]
    assert told, f"{route.path}: {route.endpoint.__name__} has no docstring"
    query = ", ".join(code(parameter.name) for parameter in route.dependant.query_params)
    answer = typing.get_type_hints(route.endpoint)["return"]
    return code(f"{min(route.methods or ())} {route.path}"), query, _kind(answer), told


def _kind(answer: object) -> str:
    """Name the type of an answer: a message by its class, everything else by its format."""
    if isinstance(answer, type) and issubclass(answer, Response):
        return "text" if "Text" in answer.__name__ else "bytes"
    return code(answer.__name__) if isinstance(answer, type) and typing.get_origin(answer) is None else "JSON"


def _errors(statuses: Mapping[type[UmbelError], int]) -> str:
    told = ", ".join(f"{status} for `{kind.__name__}`" for kind, status in statuses.items())
    return (
        'An error is `{"error": {"type": …, "message": …}}`; its status is '
        f"{told}, 422 for every other refusal, and 500 for a fault of the server.\n"
    )
