"""One shape of error for both HTTP APIs of ours: `{"error": {"type", "message"}}`. Needs FastAPI, as they do."""

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from umbel.errors import UmbelError

NAMES = {404: "NotFound", 405: "MethodNotAllowed", 400: "BadRequest"}
LONGEST = 2000
"""Characters of a message: a caller's own words may be in it."""


def shape(api: FastAPI, statuses: Mapping[type[UmbelError], int], who: Callable[[], str] = lambda: "") -> None:
    """Answer every error in that shape; `statuses` where it is not 422. `who` begins each message of an UmbelError."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        status = next((code for kind, code in statuses.items() if isinstance(error, kind)), 422)
        return answer(status, type(error).__name__, f"{who()}{error}")

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return answer(422, "WireError", "; ".join(told))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        name = NAMES.get(error.status_code, "HTTPException")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return answer(error.status_code, name, message, dict(error.headers or {}))

    async def broken(request: Request, error: Exception) -> JSONResponse:
        return answer(500, type(error).__name__, f"{request.method} {request.url.path} failed; the log here says why")

    api.add_exception_handler(UmbelError, refuse)
    api.add_exception_handler(RequestValidationError, malformed)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(Exception, broken)


def answer(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as JSON."""
    # A lone surrogate of a caller's is no UTF-8, which JSONResponse writes.
    plain = message.encode(errors="replace").decode()[:LONGEST]
    return JSONResponse({"error": {"type": kind, "message": plain}}, status_code=status, headers=dict(headers or {}))
