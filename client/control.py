"""`group_api`, `operator_api`: the control API of a site, on two sockets; adapters travel as raw bytes.

What the ClientApp asks is in the table `GROUP`: code that the centre sends can open that socket. Everything else is in
`OPERATOR`, for the daemon's own user: what overrules the site's verdict, what is trained on unsigned, and the status.
"""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from pydantic import BaseModel, ValidationError

from client.site import Site
from serving.user_example import Example
from umbel import http_errors
from umbel.adapter import AdapterManifest, AdapterName, AdapterRef, Lifecycle
from umbel.errors import Conflict, CoTrainerSilent, EngineError, NoRoom, NotFound, TrainingError, WireError
from umbel.messages import NONCE, Hello, LiveVersion, Restored, RoundOrder, RoundReport, ShadowReport, Submit

STATUS = {NotFound: 404, Conflict: 409, CoTrainerSilent: 503, TrainingError: 409, EngineError: 503, NoRoom: 507}
"""HTTP status of an error; every other umbel error is a refusal, 422."""

LOOK_S = 0.1
"""Seconds between two looks at the journal while a caller waits for a report."""
Wait = Annotated[float, Query(ge=0, le=20)]
"""Seconds that a caller is willing to wait for the end of what it asks about (long polling)."""
SHARED_WAIT_S = 3.0
"""Seconds that a caller waits at most at a site of several adapters. Their federations share a SuperNode, which has one
message in hand at a time: with the start of a process, nobody waits more than 5 s for the message of another one."""
Nonce = Annotated[str, Query(pattern=NONCE)]
"""The centre's question, for which the site signs its answer."""
R = TypeVar("R", RoundReport, ShadowReport)


def _known_query(request: Request) -> None:
    """Raise NotFound for a query parameter that the route does not have: it would mean nothing, silently."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise NotFound(f"{request.method} {request.url.path} has no parameter {name[:80]!r} on this socket")


GROUP = APIRouter(dependencies=[Depends(_known_query)])
"""Routes for the ClientApp, on the socket `[site].socket`, which the site's group may open."""
OPERATOR = APIRouter(dependencies=[Depends(_known_query)])
"""Routes for the operator's commands and the engine, on `operator.sock` in state_dir, for its owner only."""


def group_api(site: Site) -> FastAPI:
    """Make the application that answers the ClientApp."""
    return _api(site, GROUP)


def operator_api(site: Site) -> FastAPI:
    """Make the application that answers the operator and the site's own engine."""
    return _api(site, OPERATOR)


def _api(site: Site, routes: APIRouter) -> FastAPI:
    api = FastAPI(title="umbel site", docs_url=None, redoc_url=None, openapi_url=None)
    api.state.site = site
    api.include_router(routes)
    http_errors.shape(api, STATUS, lambda: f"{site.config.site.name}: ")
    return api


@GROUP.get("/hello")
async def hello(adapter: AdapterName, request: Request, nonce: Nonce = "") -> Hello:
    """Return the site's name, base, layers, and `adapter`'s counts of examples and live version, signed for `nonce`."""
    site = _site(request)
    return site.keys.sign_hello(site.hello(adapter), nonce)


@GROUP.post("/adapters/{name}/rounds/{key}")
async def submit(name: str, key: str, request: Request, wait: Wait = 0) -> RoundReport:
    """Start a round or find it again by its key: the order in `x-umbel-order`, the parent adapter as the body.

    Return how it stands; `wait`: once it has ended, or after so many seconds.
    """
    site, order = _site(request), _header(request, "x-umbel-order", RoundOrder)
    if order.key != key:
        raise WireError(f"the order is for round {order.key}, not {key}")
    tenant = site.tenant(name)
    signature = request.headers.get("x-umbel-signature", "")
    tenant.keys.require(Submit(adapter=name, order=order), signature)  # before its body is read
    tenant.jobs.submit(order, await site.bodies.read(request), signature)
    await tenant.jobs.supersede(order)
    return await _round_once_over(site, name, key, min(wait, order.plan.seconds))  # before the centre counts it as late


@GROUP.get("/adapters/{name}/rounds/{key}")
async def round_report(name: str, key: str, request: Request, wait: Wait = 0) -> RoundReport:
    """Return how a round stands; `wait`: once it has ended, or after so many seconds."""
    return await _round_once_over(_site(request), name, key, wait)


@GROUP.get("/adapters/{name}/rounds/{key}/update")
async def update(name: str, key: str, request: Request) -> Response:
    """Return the trained adapter of a round that is done, as safetensors bytes."""
    return Response(_site(request).tenant(name).jobs.update(key), media_type="application/octet-stream")


@GROUP.post("/adapters/{name}/shadow")
async def shadow(name: str, request: Request, wait: Wait = 0, nonce: Nonce = "") -> ShadowReport:
    """Receive a version and begin to judge it: its manifest in `x-umbel-manifest`, its weights as the body.

    Return how it stands, signed for `nonce`; `wait`: once there is a verdict, or after so many seconds.
    """
    site, manifest = _site(request), _header(request, "x-umbel-manifest", AdapterManifest)
    tenant = site.tenant(name)
    signature = request.headers.get("x-umbel-signature", "")
    tenant.keys.require(manifest, signature)  # before its body is read
    tenant.deployer.receive(manifest, await site.bodies.read(request), signature)
    return await _version_once_judged(site, manifest.ref, wait, nonce)


@GROUP.get("/adapters/{ref}/shadow")
async def shadow_report(ref: str, request: Request, wait: Wait = 0, nonce: Nonce = "") -> ShadowReport:
    """Return how a version stands, signed for `nonce`; `wait`: once there is a verdict, or after so many seconds."""
    return await _version_once_judged(_site(request), AdapterRef.parse(ref), wait, nonce)


@GROUP.post("/adapters/{ref}/promote")
async def promote(ref: str, request: Request) -> ShadowReport:
    """Make a judged version answer users; 409 where this site's own verdict is against it."""
    version = AdapterRef.parse(ref)
    return await _site(request).tenant(version.name).deployer.promote(version)


@GROUP.post("/adapters/{name}/restore")
async def restore(name: str, request: Request, ref: str | None = None) -> Restored:
    """Make `ref` answer users, as the registry says; without `ref` the base."""
    return await _site(request).tenant(name).deployer.restore(AdapterRef.parse(ref) if ref else None)


@GROUP.post("/adapters/{ref}/discard")
async def discard(ref: str, request: Request) -> ShadowReport:
    """Unload a shadow and never use it again."""
    version = AdapterRef.parse(ref)
    return await _site(request).tenant(version.name).deployer.discard(version)


@GROUP.post("/adapters/{name}/rollback")
async def roll_back(name: str, request: Request, instead_of: str | None = None) -> LiveVersion:
    """Make the previous version answer users; `instead_of`: only if that version answers them now."""
    only_if = AdapterRef.parse(instead_of) if instead_of else None
    return LiveVersion(live=await _site(request).tenant(name).deployer.roll_back(only_if))


@OPERATOR.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Return what `umbel status --json` prints."""
    return await _site(request).status()


@OPERATOR.post("/adapters/{ref}/promote")
async def operator_promotes(ref: str, request: Request, forced: bool = False) -> ShadowReport:
    """Make a judged version answer users; `forced`: also against this site's own verdict."""
    version = AdapterRef.parse(ref)
    return await _site(request).tenant(version.name).deployer.promote(version, forced=forced)


@OPERATOR.post("/adapters/{name}/rollback")
async def operator_rolls_back(name: str, request: Request, forced: bool = False) -> LiveVersion:
    """Make the previous version answer users; `forced`: also one from which this site went back by itself."""
    return LiveVersion(live=await _site(request).tenant(name).deployer.roll_back(forced=forced))


@OPERATOR.delete("/adapters/{name}/rounds/{key}")
async def cancel(name: str, key: str, request: Request) -> RoundReport:
    """Stop a round; one that is over stays as it is."""
    return await _site(request).tenant(name).jobs.cancel(key)


@OPERATOR.post("/served/{name}")
async def load(name: str, path: Annotated[Path, Query()], request: Request) -> dict[str, Any]:
    """Serve the PEFT directory at `path` under a name of its own; it is never trained."""
    return await _site(request).serve_only.load(name, path)


@OPERATOR.delete("/served/{name}")
async def unload(name: str, request: Request) -> dict[str, Any]:
    """Serve an adapter no more that is only served."""
    return await _site(request).serve_only.unload(name)


@OPERATOR.post("/examples")
async def keep(example: Example, request: Request) -> dict[str, int]:
    """Keep an example that a user agreed to give, scrubbed and quarantined; the router sends it."""
    return {"id": await _site(request).keep(example)}


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


async def _round_once_over(site: Site, adapter: str, key: str, wait: float) -> RoundReport:
    """Return a round's report once it has ended, or after `wait` seconds, with the version that is live by then."""
    tenant = site.tenant(adapter)
    report = await _once(lambda report: report.state.final, lambda: tenant.jobs.report(key), site, wait)
    return report.model_copy(update={"live": site.live(adapter)})


async def _version_once_judged(site: Site, version: AdapterRef, wait: float, nonce: str) -> ShadowReport:
    """Return a version's report, signed for `nonce`, once there is a verdict, or after `wait` seconds."""
    deployer = site.tenant(version.name).deployer
    await _once(_is_settled, lambda: deployer.report(version), site, wait)
    return deployer.report(version, nonce)


async def _once(over: Callable[[R], bool], read: Callable[[], R], site: Site, seconds: float) -> R:
    """Return the report that `read` gives once it is `over`; after `seconds`, or when the site stops, the last one.

    At a site of several adapters it is after SHARED_WAIT_S at the latest.
    """
    loop, report = asyncio.get_running_loop(), read()
    deadline = loop.time() + (seconds if len(site.tenants) == 1 else min(seconds, SHARED_WAIT_S))
    while not over(report) and loop.time() < deadline and not site.stopping:
        await asyncio.sleep(LOOK_S)
        report = read()
    return report


def _is_settled(report: ShadowReport) -> bool:
    """Return whether a version needs no more judging: it has a verdict, or its life has gone on without one."""
    return report.verdict is not None or report.state in (Lifecycle.LIVE, Lifecycle.RETIRED, Lifecycle.REJECTED)


def _header(request: Request, name: str, model: type[BaseModel]) -> Any:
    """Read a message from a base64 JSON header; raise WireError when it is not one."""
    try:
        return model.model_validate_json(base64.b64decode(request.headers.get(name, ""), validate=True))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"header {name}: {model.__name__}: {where}: {first['msg']}") from error
    except ValueError as error:
        raise WireError(f"header {name} is not a {model.__name__} in base64 JSON ({error})") from error
