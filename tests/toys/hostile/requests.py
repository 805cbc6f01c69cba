"""The catalogue's hostile HTTP requests: to the users' port, and to a site's control API."""

import base64
import json
from typing import Any

from tests.toys.hostile.catalogue import Hostile

CHAT = "/v1/chat/completions"
JSON = [(b"content-type", b"application/json")]
Request = tuple[str, str, list[tuple[bytes, bytes]], list[bytes]]
"""Method, path, headers, and the chunks of the body."""


def chat(**fields: Any) -> Request:
    body = {"model": "support", "messages": [{"role": "user", "content": "x"}], **fields}
    return ("POST", CHAT, JSON, [json.dumps(body).encode()])


def sent(body: bytes, path: str = CHAT, *headers: tuple[bytes, bytes]) -> Request:
    return ("POST", path, [*JSON, *headers], [body])


USERS = [  # → a request to the router
    Hostile("JSON nested 200 000 deep", lambda: sent(b"[" * 200_000), "400", "not valid JSON"),
    Hostile("half of a JSON body", lambda: sent(b'{"model": "support", "mess'), "400", "not valid JSON"),
    Hostile("bytes that are no UTF-8", lambda: sent(b'{"model": "\xff"}'), "400", "not valid JSON"),
    Hostile("a number of 100 000 digits", lambda: sent(b'{"model": "tiny", "n": ' + b"9" * 100_000 + b"}"), "400",
            "not valid JSON"),
    Hostile("65 MiB", lambda: ("POST", CHAT, JSON, [b" " * (1 << 20)] * 65), "413", "over 64 MiB"),
    Hostile("chunks without an end", lambda: ("POST", CHAT, JSON, [b" " * (1 << 22)] * 1000), "413", "over 64 MiB"),
    Hostile("no model", lambda: sent(b"{}"), "400", "'model' is missing; name a model"),
    Hostile("a model with a null byte", lambda: chat(model="support\0"), "404", r"support\\x00' does not exist"),
    Hostile("a model of a megabyte", lambda: chat(model="x" * (1 << 20)), "404", "does not exist. Available: tiny"),
    Hostile("half of a surrogate pair as the model", lambda: sent(b'{"model": "\\ud800"}'), "404", "does not exist"),
    Hostile("a version that was not promoted", lambda: chat(model="support@v3"), "404", "does not exist"),
    Hostile("another adapter's path as the model", lambda: chat(model="../support"), "404", "does not exist"),
    Hostile("SGLang's own spelling of an adapter", lambda: chat(model="tiny:support-v3"), "404", "does not exist"),
    Hostile("a billion answers (n)", lambda: chat(n=10**9), "400", "'n' is over 128"),
    Hostile("a billion, as a string", lambda: chat(n="1000000000"), "400", "'n' is a string; send a number"),
    Hostile("infinitely many (n)", lambda: sent(b'{"model": "tiny", "n": Infinity}'), "400", "'n' is over 128"),
    Hostile("a billion log probabilities", lambda: chat(top_logprobs=10**9), "400", "'top_logprobs' is over 20"),
    Hostile("a thousand prompts at once", lambda: sent(json.dumps({"model": "tiny", "prompt": ["x"] * 1000}).encode(),
            "/v1/completions"), "400", "'prompt' holds more than 256 texts; send several"),
    Hostile("pickled code (custom_logit_processor)", lambda: chat(custom_logit_processor="gASV"), "400",
            "'custom_logit_processor' cannot be chosen here; leave it out"),
    Hostile("another user's session", lambda: chat(session_params={"id": "s"}), "400", "'session_params' cannot be"),
    Hostile("another user's answer to go on from", lambda: chat(previous_response_id="resp_1"), "400",
            "'previous_response_id' cannot be chosen"),
    Hostile("another user's request id (rid)", lambda: chat(rid="a"), "400", "'rid' cannot be chosen"),
    Hostile("a machine to fetch the cache from", lambda: chat(bootstrap_host="169.254.169.254"), "400",
            "'bootstrap_host' cannot be chosen"),
    Hostile("an unknown priority", lambda: chat(priority="root"), "400", "use 'interactive', 'batch', or a number"),
    Hostile("a route of the operator's", lambda: sent(b"{}", "/load_lora_adapter"), "404", "does not exist here"),
    Hostile("a promotion", lambda: sent(b"", "/umbel/aliases", (b"authorization", b"Bearer x")), "404",
            "does not exist"),
    Hostile("a path with dots to another route", lambda: sent(b"{}", "/health/../generate"), "404", "does not exist"),
    Hostile("a path that only begins like an open one", lambda: sent(b"{}", "/health_everything"), "404", "not exist"),
    Hostile("another method on an open route", lambda: sent(b"{}", "/metrics"), "404", "does not exist"),
    Hostile("the admin key's header with bytes that are no text", lambda: sent(b"{}", "/generate",
            (b"authorization", b"Bearer \xff\xfe")), "404", "does not exist"),
]  # fmt: skip
OVERRULED = [  # answered, by the version the name means; what else the body asks for has no effect
    chat(lora_path="support-v3"),
    chat(extra_key="another tenant's cache"),
    sent(b'{"model": "support@v3", "model": "support"}'),
    ("POST", CHAT, [*JSON, (b"x-umbel-adapter", b"support@v3"), (b"x-umbel-order", b"e30=")], chat()[3]),
]


def coded(value: object) -> bytes:
    return base64.b64encode(value if isinstance(value, bytes) else json.dumps(value).encode())


MANIFEST = b"x-umbel-manifest"
CONTROL = [  # → a request to the control API
    Hostile("a manifest that is no base64", lambda: ("POST", "/adapters/support/shadow", [(MANIFEST, b"{}")], [b""]),
            "422",
            "header x-umbel-manifest is not a AdapterManifest in base64 JSON"),
    Hostile("a manifest in bytes that are no text", lambda: ("POST", "/adapters/support/shadow",
            [(MANIFEST, b"\xff\xfe")], [b""]), "422", "header x-umbel-manifest is not a"),
    Hostile("no manifest", lambda: ("POST", "/adapters/support/shadow", [], [b"x"]), "422", "x-umbel-manifest"),
    Hostile("a manifest of a megabyte that is none", lambda: ("POST", "/adapters/support/shadow",
            [(MANIFEST, coded({"name": "x" * 700_000}))], [b""]), "422", "x-umbel-manifest: AdapterManifest: "),
    Hostile("an order that is no JSON", lambda: ("POST", "/adapters/support/rounds/k", [(b"x-umbel-order",
            coded(b"\x00"))], [b""]), "422", "x-umbel-order: RoundOrder: .*Invalid JSON"),
    Hostile("an order for another round than the path's", lambda: ("POST", "/adapters/support/rounds/k",
            [(b"x-umbel-order", coded(order(key="other")))], [b""]), "422", "the order is for round other, not k"),
    Hostile("an order whose key is a path", lambda: ("POST", "/adapters/support/rounds/k",
            [(b"x-umbel-order", coded(order(key="../../k")))], [b""]), "422", "x-umbel-order: RoundOrder: key: "),
    Hostile("an order to train for ever", lambda: ("POST", "/adapters/support/rounds/k",
            [(b"x-umbel-order", coded(order(seconds="inf")))], [b""]), "422", "plan.seconds: .*finite"),
    Hostile("an order for an adapter that is not here", lambda: ("POST", "/adapters/other/rounds/k",
            [(b"x-umbel-order", coded(order()))], [b""]), "404", "there is no adapter 'other' here; there is support"),
    Hostile("a version whose name is a path", lambda: ("POST", "/adapters/..%2F..%2Fx@v1/promote", [], [b""]),
            "404|422",
            "Not Found|not an adapter version"),
    Hostile("a version of 30 digits", lambda: ("POST", f"/adapters/support@v{'9' * 30}/promote", [], [b""]), "422",
            "is not an adapter version; write it like 'support@v12'"),
    Hostile("a route that is not there", lambda: ("GET", "/adapters", [], [b""]), "404", "GET /adapters: Not Found"),
    Hostile("another method", lambda: ("DELETE", "/hello", [], [b""]), "405", "DELETE /hello: Method Not Allowed"),
]  # fmt: skip


def order(key: str = "k", **plan: Any) -> dict[str, Any]:
    return {"key": key, "base": "b", "parent": "p", "round": 1, "plan": {"rank": 2, "steps": 1, "seconds": 1, **plan}}
