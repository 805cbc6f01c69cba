"""The registry's REST API: the commands of `umbel adapter`, under the same names. Changes need the token.

GET  /adapter/ls · /adapter/show/{ref} · /adapter/diff/{old}/{new} · /adapter/alias/{name} (its history) ·
     /adapter/lineage/{ref} · /adapter/verify · /adapter/verify/{ref} · /adapter/export/{ref} (a tar) · /adapter/gc ·
     /metrics (for Prometheus, see server/registry/metrics.py)
POST /adapter/alias/{ref} {"alias", "why"} · /adapter/rollback/{name} {"why"} · /adapter/gc {"why", "drop_ancestors"}
"""

import secrets
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from server.registry import lineage, metrics
from server.registry import views as registry_views
from server.registry.index import explained
from server.registry.peft import export as adapter_export
from server.registry.registry import AdapterRegistry
from umbel import http_errors, ports, secret_file
from umbel.errors import ConfigError, Conflict, NotFound, UmbelError

routes = APIRouter(prefix="/adapter")


class Change(BaseModel):
    """The body of a change; the caller is the holder of the token, and may name a person in `who`."""

    model_config = {"extra": "forbid"}

    why: str = Field(min_length=1)
    who: str = ""
    alias: str = ""
    drop_ancestors: bool = False


class Unauthorized(UmbelError):
    """A change without the right token."""


STATUS = {Unauthorized: 401, NotFound: 404, Conflict: 409}
"""HTTP status of an error; every other umbel error is a refusal, 422."""


def registry_api(root: Path, token: str | None = None) -> FastAPI:
    """Return the application over one registry; without a token it only reads."""
    # strict_content_type=False: a body without a content-type is read as JSON.
    api = FastAPI(title="umbel registry", docs_url=None, redoc_url=None, openapi_url=None, strict_content_type=False)
    api.state.root, api.state.token = root, token
    api.include_router(routes)
    api.state.metrics = metrics.collected(root)
    api.include_router(metrics.routes)
    http_errors.shape(api, STATUS)
    return api


def serve(root: Path, host: str, port: int, token_file: Path | None) -> None:
    """Serve until a signal ends it; raise RegistryError or ConfigError first if it cannot start."""
    import uvicorn

    token = read_token(token_file) if token_file else None
    AdapterRegistry(root).close()
    if why := ports.refusal(host, port):  # uvicorn would log it, and end with status 1
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({why}); stop what listens there, or choose another --port or --host"
        )
    uvicorn.run(registry_api(root, token), host=host, port=port, access_log=False)


def read_token(path: Path) -> str:
    """Read the token from a file that only its owner can read; raise ConfigError for any other file."""
    token = secret_file.read(path, "the token").strip()
    if len(token) < secret_file.SHORTEST:
        raise ConfigError(f"{path}: the token is too short; head -c 32 /dev/urandom | base64 > {path}")
    return token


def _authorized(request: Request) -> None:
    """Let the holder of the token pass."""
    token: str | None = request.app.state.token
    if token is None:
        raise Unauthorized("this registry is served for reading only; start it with --token-file to allow changes")
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), token.encode()):
        raise Unauthorized("a change needs the header `authorization: Bearer TOKEN`")


@contextmanager
def _opened(request: Request) -> Iterator[AdapterRegistry]:
    """Open the registry for one request: SQLite connections stay in the thread that made them."""
    root: Path = request.app.state.root
    with explained(root), closing(AdapterRegistry(root)) as registry:
        yield registry


@routes.get("/ls")
def ls(request: Request) -> list[dict[str, Any]]:
    """Return every version: its round, its sites, its state and the aliases that point to it."""
    with _opened(request) as registry:
        return registry_views.ls(registry)


@routes.get("/show/{ref}")
def show(ref: str, request: Request) -> dict[str, Any]:
    """Return a version's manifest, as it was published."""
    with _opened(request) as registry:
        return registry_views.show(registry, ref)


@routes.get("/diff/{old}/{new}")
def diff(old: str, new: str, request: Request) -> dict[str, Any]:
    """Return the differences between two versions, in their manifests and their weight changes."""
    with _opened(request) as registry:
        return registry_views.diff(registry, old, new)


@routes.get("/alias/{name}")
def history(name: str, request: Request) -> list[dict[str, Any]]:
    """Return every move of an adapter's aliases, oldest first: when, to what, by whom and why."""
    with _opened(request) as registry:
        return registry_views.history(registry, name)


@routes.get("/lineage/{ref}")
def show_lineage(ref: str, request: Request) -> PlainTextResponse:
    """Return the tree of versions that `umbel adapter lineage` prints, as text."""
    with _opened(request) as registry:
        return PlainTextResponse(lineage.text(registry_views.nodes(registry, ref)) + "\n")


@routes.get("/verify")
def verify(request: Request) -> dict[str, Any]:
    """Compare every byte of every version with its digests."""
    with _opened(request) as registry:
        return registry_views.verify(registry)


@routes.get("/verify/{ref}")
def verify_one(ref: str, request: Request) -> dict[str, Any]:
    """Compare every byte of one version with its digests."""
    with _opened(request) as registry:
        return registry_views.verify(registry, ref)


@routes.get("/export/{ref}")
def export(ref: str, request: Request) -> FileResponse:
    """Answer with the exported directory as an uncompressed tar."""
    with _opened(request) as registry:
        resolved = registry.resolve(ref)
        folder = tempfile.TemporaryDirectory(prefix="umbel-export-")
        name = resolved.engine_name
        archive = Path(folder.name) / f"{name}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(adapter_export.export(registry, resolved, Path(folder.name) / name), arcname=name)
    return FileResponse(archive, filename=archive.name, background=BackgroundTask(folder.cleanup))


@routes.get("/gc")
def gc_plan(request: Request, drop_ancestors: bool = False) -> dict[str, Any]:
    """Return the weights that a `gc` would remove; nothing is removed."""
    with _opened(request) as registry:
        return registry_views.gc(registry, apply=False, drop_ancestors=drop_ancestors, who="", why="")


@routes.post("/alias/{ref}", dependencies=[Depends(_authorized)])
def alias(ref: str, change: Change, request: Request) -> dict[str, str]:
    """Point `alias` to a version."""
    with _opened(request) as registry:
        resolved = registry.resolve(ref)
        registry.point(resolved.name, {change.alias: resolved}, who=_who(change, request), why=change.why)
        return {change.alias: str(resolved)}


@routes.post("/rollback/{name}", dependencies=[Depends(_authorized)])
def rollback(name: str, change: Change, request: Request) -> dict[str, str]:
    """Point `head` and `live` back to the version that was live before."""
    with _opened(request) as registry:
        return {"live": str(registry.roll_back(name, who=_who(change, request), why=change.why))}


@routes.post("/gc", dependencies=[Depends(_authorized)])
def gc(change: Change, request: Request) -> dict[str, Any]:
    """Remove weights that no alias, open round or lineage needs."""
    with _opened(request) as registry:
        return registry_views.gc(
            registry, apply=True, drop_ancestors=change.drop_ancestors, who=_who(change, request), why=change.why
        )


def _who(change: Change, request: Request) -> str:
    """Name the author of a change for the history: the person that the caller names, and the caller's address."""
    address = request.client.host if request.client else "unknown"
    return f"{change.who or 'token holder'} from {address}"
