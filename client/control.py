"""The control API of a site: JSON bodies from `umbel.messages`, adapters as raw bytes, on the daemon's Unix socket."""

import base64
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, ValidationError

from client.site import Site
from serving.user_example import Example
from umbel import http_errors
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import Conflict, EngineError, NotFound, TrainingError, WireError
from umbel.messages import Hello, LiveVersion, Restored, RoundOrder, RoundReport, ShadowReport

MAX_ADAPTER_BYTES = 4 << 30
STATUS = {NotFound: 404, Conflict: 409, TrainingError: 409, EngineError: 503}
"""HTTP status of an error; every other umbel error is a refusal, 422."""

routes = APIRouter()


def control_api(site: Site) -> FastAPI:
    """The application that speaks for one site."""
    api = FastAPI(title="umbel site", docs_url=None, redoc_url=None, openapi_url=None)
    api.state.site = site
    api.include_router(routes)
    http_errors.shape(api, STATUS, lambda: f"{site.config.site.name}: ")
    return api


@routes.get("/hello")
async def hello(request: Request) -> Hello:
    return _site(request).hello()


@routes.get("/status")
async def status(request: Request) -> dict[str, Any]:
    return await _site(request).status()


@routes.post("/adapters/{name}/rounds/{key}")
async def submit(name: str, key: str, request: Request) -> RoundReport:
    order = _header(request, "x-umbel-order", RoundOrder)
    if order.key != key:
        raise WireError(f"the order is for round {order.key}, not {key}")
    _site(request).config.require_adapter(name)
    signature = request.headers.get("x-umbel-signature", "")
    report = _site(request).jobs.submit(name, order, await _body(request), signature)
    await _site(request).jobs.supersede(name, order)
    return report


@routes.get("/adapters/{name}/rounds/{key}")
async def round_report(name: str, key: str, request: Request) -> RoundReport:
    return _site(request).jobs.report(key)


@routes.get("/adapters/{name}/rounds/{key}/update")
async def update(name: str, key: str, request: Request) -> Response:
    return Response(_site(request).jobs.update(key), media_type="application/octet-stream")


@routes.delete("/adapters/{name}/rounds/{key}")
async def cancel(name: str, key: str, request: Request) -> RoundReport:
    return await _site(request).jobs.cancel(key)


@routes.post("/adapters/{name}/shadow")
async def shadow(name: str, request: Request) -> ShadowReport:
    manifest = _header(request, "x-umbel-manifest", AdapterManifest)
    signature = request.headers.get("x-umbel-signature", "")
    return _site(request).deployer.receive(name, manifest, await _body(request), signature)


@routes.get("/adapters/{ref}/shadow")
async def shadow_report(ref: str, request: Request) -> ShadowReport:
    return _site(request).deployer.report(AdapterRef.parse(ref))


@routes.post("/adapters/{ref}/promote")
async def promote(ref: str, request: Request, forced: bool = False) -> ShadowReport:
    return await _site(request).deployer.promote(AdapterRef.parse(ref), forced=forced)


@routes.post("/adapters/{name}/restore")
async def restore(name: str, request: Request, ref: str | None = None) -> Restored:
    return await _site(request).deployer.restore(name, AdapterRef.parse(ref) if ref else None)


@routes.post("/adapters/{ref}/discard")
async def discard(ref: str, request: Request) -> ShadowReport:
    return await _site(request).deployer.discard(AdapterRef.parse(ref))


@routes.post("/examples")
async def keep(example: Example, request: Request) -> dict[str, int]:
    return {"id": await _site(request).keep(example)}


@routes.post("/adapters/{name}/rollback")
async def roll_back(name: str, request: Request, instead_of: str | None = None, forced: bool = False) -> LiveVersion:
    only_if = AdapterRef.parse(instead_of) if instead_of else None
    return LiveVersion(live=await _site(request).deployer.roll_back(name, only_if, forced=forced))


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


def _header(request: Request, name: str, model: type[BaseModel]) -> Any:
    """A message from a base64 JSON header; raise WireError when it is not one."""
    try:
        return model.model_validate_json(base64.b64decode(request.headers.get(name, ""), validate=True))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"header {name}: {model.__name__}: {where}: {first['msg']}") from error
    except ValueError as error:
        raise WireError(f"header {name} is not a {model.__name__} in base64 JSON ({error})") from error


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_ADAPTER_BYTES:
            raise WireError(f"the adapter is over {MAX_ADAPTER_BYTES >> 30} GiB")
    return bytes(body)
