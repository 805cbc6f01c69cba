"""`shape`: one form of error for both HTTP APIs of umbel, `{"error": {"type", "message"}}`. Needs FastAPI."""

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from umbel.errors import UmbelError

NAMES = {404: "NotFound", 405: "MethodNotAllowed", 400: "BadRequest"}
LONGEST = 2000
"""Largest length of a message, in characters: it may quote the caller's own words."""


def shape(api: FastAPI, statuses: Mapping[type[UmbelError], int], prefix: Callable[[], str] = lambda: "") -> None:
    """Let `api` answer every error in that form.

    `statuses` maps errors to HTTP statuses; any other UmbelError is 422. `prefix` returns the first words of the
    message of an UmbelError.
    """

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        status = next((code for kind, code in statuses.items() if isinstance(error, kind)), 422)
        return answer(status, type(error).__name__, f"{prefix()}{error}")

    async def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        mistakes = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return answer(422, "WireError", "; ".join(mistakes))

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
    """Return an error as JSON; `kind` is the name of its class."""
    # A caller's words may hold a lone surrogate, which JSONResponse could not encode as UTF-8.
    plain = message.encode(errors="replace").decode()[:LONGEST]
    return JSONResponse({"error": {"type": kind, "message": plain}}, status_code=status, headers=dict(headers or {}))
