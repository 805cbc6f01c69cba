"""`Consent`: remembers answers whose users agree to training, and hands them to the daemon once users accept them.

    POST /v1/chat/completions   x-umbel-consent: train, and a `user`   → remembered for an hour, in memory only
    POST /v1/examples           x-umbel-consent: train                 → handed to the site's daemon
         {"id": "<of the answer>", "accept": true}  or  {"id": …, "correction": "<what it should have said>"}
         {"id": …, "accept": true, "instead_of": "<of a worse answer to the same prompt>"}

What is better than what is kept as a pair: a correction with the answer that it corrects, an accepted answer with the
one that it is accepted instead of.

With `[examples]`, this is the outermost layer of SGLang's HTTP process: Consent → Router → SGLang. Without, the router
is the outermost. A request without the header passes unchanged.
"""

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.router import asgi
from serving.router.api_keys import Access, ApiKeys
from serving.router.asgi import ASGIApp, Message, Receive, Scope, Send
from serving.router.bodies import Bodies, BodyRefused, refuse
from serving.router.latest import Latest
from serving.user_example import MAX_EXAMPLE_BYTES, ROLES, SETTINGS, ConsentSettings, Example, unfit
from umbel.errors import RequestRefused
from umbel.printable import control

CHAT, EXAMPLES = "/v1/chat/completions", "/v1/examples"
HEADER, CONSENT = b"x-umbel-consent", b"train"
MAX_ANSWERS = 1000
"""Number of latest answers, of all adapters, that can still be accepted."""
ANSWER_TTL_S = 3600.0
"""Seconds after which an answer can no longer be accepted."""
MAX_BYTES = 1 << 20
"""Limit on a request's body, and on an answer's; longer ones are not remembered."""
DAEMON_TIMEOUT_S = 30.0
"""Seconds that the daemon may take to scrub and store an example."""


class Offer(BaseModel):
    """The body of POST /v1/examples: a user accepts an answer, perhaps instead of a worse one, or corrects it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=256)]
    accept: Literal[True] | None = None
    correction: Annotated[str, Field(pattern=r"\S")] | None = None
    instead_of: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.accept is None) == (self.correction is None):
            raise ValueError('say either "accept": true or "correction": "…"')
        if self.instead_of is not None and (self.correction is not None or self.instead_of == self.id):
            raise ValueError('"instead_of" names another answer, and goes with "accept": true')
        return self


@dataclass(frozen=True)
class _Answer:
    """An answer that can still be accepted. It is never formatted, which keeps it out of every log."""

    example: Example
    at: float


class Consent:
    """ASGI middleware around the router.

    Users' `keys` are checked here as well as in the router: /v1/examples never reaches the router, and without
    `[examples]` only the router is there. A request without a valid key is left to the router, which refuses it. An
    answer of an adapter that a key does not open is unknown to it.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ConsentSettings,
        daemon: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        keys: ApiKeys | None = None,
        bodies: Bodies | None = None,
    ) -> None:
        self._app = app
        self._bodies = bodies or Bodies()
        self._settings = settings
        self._keys = keys or ApiKeys()
        self._clock = clock
        self._daemon = daemon
        self._answers: Latest[_Answer] = Latest(MAX_ANSWERS)
        self._handed: set[str] = set()
        """Answers that are being handed over, so that nobody accepts them once more meanwhile."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        agreed = scope["type"] == "http" and (HEADER, CONSENT) in scope["headers"] and scope["method"] == "POST"
        access = self._keys.admit(scope["headers"]) if agreed else None
        if access is not None and scope["path"] == EXAMPLES:
            return await self._offered(access, receive, send)
        if access is not None and scope["path"] == CHAT:
            return await self._answer(scope, receive, send)
        return await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._bodies.read(scope, receive) as body:
                asked = _suitable(body, self._settings.models)
                replayed = asgi.Replay(body, receive)
                if asked is None:
                    return await self._app(scope, replayed, send)
                seen = _Seen(send)
                await self._app(scope, replayed, seen)
                return self._remember(asked, seen)
        except BodyRefused as refused:
            return await refuse(send, refused, scope["path"])

    def _remember(self, asked: dict[str, Any], seen: "_Seen") -> None:
        found = seen.answer()
        if found is None or seen.version is None:
            return
        answer, text = found
        user = hmac.new(bytes.fromhex(self._settings.key), asked["user"].encode(), hashlib.sha256).hexdigest()
        messages = [*asked["messages"], {"role": "assistant", "content": text}]
        if unfit(messages):
            return
        adapter = self._settings.models[asked["model"]]
        example = Example(user=user, messages=messages, adapter=adapter, version=seen.version, kind="accepted")
        self._forget_old()
        self._answers.remember(answer, adapter, _Answer(example, self._clock()))

    def _forget_old(self) -> None:
        oldest = self._clock() - ANSWER_TTL_S
        while old := [name for name, answer in self._answers.oldest() if answer.at < oldest]:
            for name in old:
                self._answers.forget(name)

    async def _offered(self, access: Access, receive: Receive, send: Send) -> None:
        body = await asgi.read_body(receive, MAX_BYTES)
        if body is None:
            return await asgi.error(send, 413, f"The body is over {MAX_BYTES >> 20} MiB.", "invalid_request_error")
        try:
            offer = Offer.model_validate_json(body)
        except ValidationError as error:  # the text of the error itself would quote the correction
            said = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in error.errors())
            return await asgi.error(send, 400, said, "invalid_request_error")
        self._forget_old()
        named = [name for name in (offer.id, offer.instead_of) if name is not None]
        found = [self._known(name, access) for name in named]
        for name, answer in zip(named, found, strict=True):
            if answer is None:
                return await asgi.error(send, 404, _unknown(name), "invalid_request_error")
        example, *worse = (answer.example for answer in found if answer is not None)
        try:
            example = _judged(example, offer, worse)
        except RequestRefused as refused:
            return await asgi.error(send, 400, str(refused), "invalid_request_error", refused.field)
        self._handed.update(named)
        try:
            status, said = await self._hand_over(example)
        finally:
            self._handed.difference_update(named)
        if status == 200:
            for name in named:
                self._answers.forget(name)
            return await asgi.reply(send, 200, {"id": offer.id, "object": "example", "state": "quarantine"})
        return await asgi.error(send, status, said, "server_error" if status >= 500 else "invalid_request_error")

    def _known(self, name: str, access: Access) -> _Answer | None:
        """Return an answer that can be kept and that a key opens; None for any other."""
        answer = self._answers.get(name)
        known = answer is not None and name not in self._handed and access.sees(answer.example.adapter)
        return answer if known else None

    async def _hand_over(self, example: Example) -> tuple[int, str]:
        """Send an example to the daemon; return its status, and its reason if it refuses."""
        # There is no TLS on a socket, and users would wait for the 50 ms that reading the system's certificates takes.
        transport = self._daemon or httpx.AsyncHTTPTransport(verify=False, uds=str(self._settings.socket))
        try:
            async with httpx.AsyncClient(transport=transport, timeout=DAEMON_TIMEOUT_S) as client:
                reply = await client.post("http://site/examples", json=example.model_dump(exclude_defaults=True))
        except httpx.HTTPError:
            return 503, "The site cannot keep examples now; try again."
        said = reply.json() if reply.status_code == 200 or "error" in reply.text else {}
        return reply.status_code, str(said.get("error", {}).get("message", "The site does not take this example."))


class _Seen:
    """A `send` that passes an answer on unchanged and keeps a copy of it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status = 0
        self._stream = False
        self._body = bytearray()
        self.version: str | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", []))
            self._status = message["status"]
            self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self.version = headers.get(b"x-umbel-adapter", b"").decode() or None
        elif len(self._body) <= MAX_BYTES:
            self._body += message.get("body", b"")
        await self._send(message)

    def answer(self) -> tuple[str, str] | None:
        """Return the answer's id and text; None unless it is one choice, of text only, that was not cut short."""
        if self._status != 200 or len(self._body) > MAX_BYTES:
            return None
        try:
            parts = _events(bytes(self._body)) if self._stream else [json.loads(self._body)]
        except ValueError:
            return None  # not an answer as OpenAI's clients know it
        choices = [choice for part in parts for choice in part.get("choices", [])]
        said = [choice.get("delta" if self._stream else "message") or {} for choice in choices]
        if not any(choice.get("finish_reason") == "stop" for choice in choices) or any(
            one.get("tool_calls") for one in said
        ):
            return None
        text = "".join(one.get("content") or "" for one in said)
        return (str(parts[0]["id"]), text) if text.strip() and parts[0].get("id") else None


def _judged(example: Example, offer: Offer, worse: list[Example]) -> Example:
    """Return an answer as its user judges it; raise RequestRefused for what cannot be an example."""
    messages, rejected, field = example.messages, "", "instead_of"
    answered = messages[-1]["content"]
    if offer.correction is not None:
        field, rejected = "correction", answered
        messages = [*messages[:-1], {"role": "assistant", "content": offer.correction}]
    for one in worse:
        rejected = one.messages[-1]["content"]
        if (one.user, one.adapter, one.messages[:-1]) != (example.user, example.adapter, messages[:-1]):
            raise RequestRefused("instead_of: that answer is to another prompt, user or adapter.", field)
    if rejected == messages[-1]["content"]:  # nothing is better than itself
        rejected = ""
    if why := unfit([*messages, {"role": "assistant", "content": rejected}]):
        raise RequestRefused(f"{field}: {why}.", field)
    kind = "accepted" if offer.correction is None else "corrected"
    return example.model_copy(update={"messages": messages, "kind": kind, "rejected": rejected})


def _unknown(name: str) -> str:
    return (
        f"There is no answer {name!r} that could be kept: one of the last hour, from {CHAT}, asked with the header and "
        f"a 'user', come to its own end rather than cut by max_tokens, and with its prompt at most "
        f"{MAX_EXAMPLE_BYTES >> 10} KiB of text without control characters, from {', '.join(ROLES)}."
    )


def with_consent(app: ASGIApp, run_dir: Path, keys: ApiKeys | None = None, bodies: Bodies | None = None) -> ASGIApp:
    """Wrap `app` in a `Consent` if the daemon left settings for it in `run_dir`; else return `app` itself."""
    file = run_dir / SETTINGS
    if not file.is_file():
        return app
    return Consent(app, ConsentSettings.model_validate_json(file.read_text()), keys=keys, bodies=bodies)


def _events(stream: bytes) -> list[dict[str, Any]]:
    """Return the chunks of a server-sent stream."""
    data = [line[5:].strip() for line in stream.splitlines() if line.startswith(b"data:")]
    return [json.loads(chunk) for chunk in data if chunk != b"[DONE]"]


def _suitable(body: bytes, models: Collection[str]) -> dict[str, Any] | None:
    """Return the request if its answer can become an example, else None.

    It must name a user and the live version of an adapter, and ask for one choice, with texts only and no tools.
    """
    if len(body) > MAX_BYTES:
        return None
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the router refuses it
    if not isinstance(asked, dict) or asked.get("n", 1) not in (1, None):
        return None
    if not isinstance(asked.get("model"), str) or asked["model"] not in models:
        return None
    messages, user = asked.get("messages"), asked.get("user")
    fit = isinstance(messages, list) and unfit(messages) is None
    return asked if fit and isinstance(user, str) and user and not control(user) and not asked.get("tools") else None
