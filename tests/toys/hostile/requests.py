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


def to(path: str, **fields: Any) -> Request:
    """Ask another route than chat, in a body that is a good one but for `fields`."""
    good: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    }  # fmt: skip
    return ("POST", path, JSON, [json.dumps({"model": "tiny", **good[path], **fields}).encode()])


def schema(**inner: Any) -> Request:
    """Ask for an answer by a JSON schema."""
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": inner}})


def sent(body: bytes, path: str = CHAT, *headers: tuple[bytes, bytes]) -> Request:
    return ("POST", path, [*JSON, *headers], [body])


USERS = [  # → a request to the router
    Hostile("JSON nested 200 000 deep", lambda: sent(b"[" * 200_000), "400", "not valid JSON"),
    Hostile("half of a JSON body", lambda: sent(b'{"model": "support", "mess'), "400", "not valid JSON"),
    Hostile("bytes that are no UTF-8", lambda: sent(b'{"model": "\xff"}'), "400", "not valid JSON"),
    Hostile("a number of 100 000 digits", lambda: sent(b'{"model": "tiny", "n": ' + b"9" * 100_000 + b"}"), "400",
            "not valid JSON"),
    Hostile("9 MiB", lambda: ("POST", CHAT, JSON, [b" " * (1 << 20)] * 9), "413", "over 8 MiB; send a shorter one"),
    Hostile("chunks without an end", lambda: ("POST", CHAT, JSON, [b" " * (1 << 16)] * 1000), "413", "over 8 MiB"),
    Hostile("a length of a petabyte", lambda: ("POST", CHAT, [*JSON, (b"content-length", b"1" + b"0" * 15)], [b"{"]),
            "413", "over 8 MiB"),
    Hostile("no model", lambda: sent(b"{}"), "400", "'model' is missing; name a model"),
    Hostile("a model with a null byte", lambda: chat(model="support\0"), "404", r"support\\x00' does not exist"),
    Hostile("a model of a megabyte", lambda: chat(model="x" * (1 << 20)), "404", "does not exist. Available: tiny"),
    Hostile("half of a surrogate pair as the model", lambda: sent(b'{"model": "\\ud800"}'), "404", "does not exist"),
    Hostile("half of a surrogate pair in a message", lambda: sent(
            b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'), "400", "half of a surrogate"),
    Hostile("a field twice", lambda: sent(b'{"model": "support@v3", "model": "support"}'), "400",
            "holds 'model' twice; leave one out"),
    Hostile("a version that was not promoted", lambda: chat(model="support@v3"), "404", "does not exist"),
    Hostile("another adapter's path as the model", lambda: chat(model="../support"), "404", "does not exist"),
    Hostile("SGLang's own spelling of an adapter", lambda: chat(model="tiny:support-v3"), "404", "does not exist"),
    Hostile("a billion answers (n)", lambda: chat(n=10**9), "400", "'n' is over 128"),
    Hostile("a billion, as a string", lambda: chat(n="1000000000"), "400", "'n' is a string; send a number"),
    Hostile("infinitely many (n)", lambda: sent(b'{"model": "tiny", "n": Infinity}'), "400", "Infinity is no number"),
    Hostile("a billion log probabilities", lambda: chat(top_logprobs=10**9), "400", "'top_logprobs' is over 20"),
    Hostile("a thousand prompts at once", lambda: sent(json.dumps({"model": "tiny", "prompt": ["x"] * 1000}).encode(),
            "/v1/completions"), "400", "'prompt' holds more than 128 texts; send several"),
    Hostile("pickled code (custom_logit_processor)", lambda: chat(custom_logit_processor="gASV"), "400",
            "'custom_logit_processor' cannot be chosen here .*; leave it out"),
    Hostile("another user's session", lambda: chat(session_params={"id": "s"}), "400", "'session_params' cannot be"),
    Hostile("another user's answer to go on from", lambda: chat(previous_response_id="resp_1"), "400",
            "'previous_response_id' cannot be chosen"),
    Hostile("another user's request id (rid)", lambda: chat(rid="a"), "400", "'rid' cannot be chosen"),
    Hostile("a machine to fetch the cache from", lambda: chat(bootstrap_host="169.254.169.254"), "400",
            "'bootstrap_host' cannot be chosen"),
    Hostile("a top_k over 32 bits", lambda: chat(top_k=1 << 31), "400", "'top_k' is over"),
    Hostile("a stop token that is not in the vocabulary", lambda: chat(stop_token_ids=[10**9], min_tokens=1), "400",
            "'stop_token_ids' holds 1000000000, which is no token id of the base"),
    Hostile("a prompt token that is not in the vocabulary", lambda: to("/v1/completions", prompt=[10**9]), "400",
            "'prompt' holds 1000000000, which is no token id"),
    Hostile("tokens in place of the conversation", lambda: chat(input_ids=[10**9]), "400", "'input_ids' cannot be"),
    Hostile("a bias for a token that is not there", lambda: chat(logit_bias={"999999999": 1.0}), "400",
            "'logit_bias' holds '999999999', which is no token id"),
    Hostile("a bias of 1e308", lambda: chat(logit_bias={"3": 1e308}), "400", "'logit_bias.3' is no number from"),
    Hostile("a repetition penalty of 1e-40", lambda: chat(repetition_penalty=1e-40), "400",
            "'repetition_penalty' is below 0.01"),
    Hostile("a seed of 30 digits", lambda: chat(seed=10**30), "400", "'seed' is over"),
    Hostile("a chat template of one's own", lambda: to("/v1/responses", chat_template_kwargs={
            "chat_template": "{{ 'x' * 10**10 }}"}), "400", "'chat_template_kwargs.chat_template' is not a field"),
    Hostile("a regular expression that backtracks (stop_regex)", lambda: chat(stop_regex="(?s:.|..)*\0",
            min_tokens=80), "400", "'stop_regex' cannot be chosen here .*; use 'stop'"),
    Hostile("the same to plain completions", lambda: to("/v1/completions", stop_regex="(?s:.|..)*"), "400",
            "'stop_regex' cannot be"),
    Hostile("a request id of which all others begin", lambda: to("/v1/responses", request_id="a"), "400",
            "'request_id' cannot be chosen here"),
    Hostile("a session of others", lambda: chat(session_id="s"), "400", "'session_id' cannot be chosen here"),
    Hostile("128 answers to 256 prompts", lambda: to("/v1/completions", prompt=["a"] * 100, n=128), "400",
            "'n' makes 12800 answers"),
    Hostile("worker 0 (data_parallel_rank)", lambda: chat(data_parallel_rank=0), "400",
            "'data_parallel_rank' cannot be chosen"),
    Hostile("a worker for the first part", lambda: to("/v1/messages", disagg_prefill_dp_rank=0), "400",
            "'disagg_prefill_dp_rank' cannot be chosen"),
    Hostile("true for a number", lambda: chat(n=True), "400", "'n' is a boolean; send a whole number"),
    Hostile("an answer to be kept (background)", lambda: to("/v1/responses", background=True), "400",
            "'background' cannot be"),
    Hostile("another version by its path (lora_path)", lambda: chat(lora_path="support-v3"), "400",
            "'lora_path' cannot be chosen"),
    Hostile("another tenant's cache (extra_key)", lambda: chat(extra_key="x"), "400", "'extra_key' cannot be"),
    Hostile("a grammar of one's own", lambda: chat(ebnf="root ::= root root"), "400", "'ebnf' cannot be chosen here"),
    Hostile("a schema by a regular expression", lambda: schema(type="string", pattern="((a{100}){100}){100}"), "400",
            "schema.pattern' is a keyword that cannot be compiled"),
    Hostile("a schema of a million characters", lambda: schema(type="string", maxLength=10**6), "400",
            "schema.maxLength' is no whole number up to"),
    Hostile("a schema that refers to itself", lambda: schema(**{"$ref": "#"}), "400", "describes a value by itself"),
    Hostile("a schema that refers to nothing", lambda: schema(**{"$ref": "#/$defs/x"}), "400",
            "refers to '#/.defs/x', which is no schema"),
    Hostile("a schema nested 100 deep", lambda: schema(**json.loads('{"items":' * 100 + "{}" + "}" * 100)), "400",
            "nested deeper than 64"),
    Hostile("a file of the machine as an image", lambda: chat(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]), "400",
            "'messages.0..content.0.' is of type 'image_url'; only 'text'"),
    Hostile("a field of the next release", lambda: chat(run_code="x"), "400", "'run_code' is not a field of"),
    Hostile("an unknown priority", lambda: chat(priority="root"), "400", "use 'interactive' or 'batch'"),
    Hostile("a priority above every user's", lambda: chat(priority=10**6), "400", "use 'interactive' or 'batch'"),
    Hostile("a route of the operator's", lambda: sent(b"{}", "/load_lora_adapter"), "404", "does not exist here"),
    Hostile("a promotion", lambda: sent(b"", "/umbel/aliases", (b"authorization", b"Bearer x")), "404",
            "does not exist"),
    Hostile("a path with dots to another route", lambda: sent(b"{}", "/health/../generate"), "404", "does not exist"),
    Hostile("a path that only begins like an open one", lambda: sent(b"{}", "/health_everything"), "404", "not exist"),
    Hostile("another method on an open route", lambda: sent(b"{}", "/metrics"), "404", "does not exist"),
    Hostile("the admin key's header with bytes that are no text", lambda: sent(b"{}", "/generate",
            (b"authorization", b"Bearer \xff\xfe")), "404", "does not exist"),
]  # fmt: skip
OVERRULED = [  # answered, by the version the name means; what the headers ask for has no effect
    ("POST", CHAT, [*JSON, (b"x-umbel-adapter", b"support@v3"), (b"x-umbel-order", b"e30=")], chat()[3]),
    ("POST", CHAT, [*JSON, (b"x-data-parallel-rank", b"0"), (b"x-override-rid", b"a")], chat()[3]),
    ("POST", CHAT, [*JSON, (b"x-override-priority", b"9")], chat()[3]),
    ("POST", CHAT, [*JSON, (b"x-smg-routing-key", b"a"), (b"x-sglext-return-input-ids", b"1")], chat()[3]),
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
            [(b"x-umbel-order", coded(order()))], [b""]), "404", "this site trains no adapter 'other'"),
    Hostile("a version whose name is a path", lambda: ("POST", "/adapters/..%2F..%2Fx@v1/promote", [], [b""]),
            "404|422",
            "Not Found|not an adapter version"),
    Hostile("a version of 30 digits", lambda: ("POST", f"/adapters/support@v{'9' * 30}/promote", [], [b""]), "422",
            "is not an adapter version; write it like 'support@v12'"),
    Hostile("a roll-back that is forced", lambda: ("POST", "/adapters/support/rollback?forced=true", [], [b""]), "404",
            "has no parameter 'forced' on this socket"),
    Hostile("a user's example, unsigned", lambda: ("POST", "/examples", [], [b"{}"]), "404", "Not Found"),
    Hostile("the operator's status", lambda: ("GET", "/status", [], [b""]), "404", "Not Found"),
    Hostile("a cancelled round", lambda: ("DELETE", "/adapters/support/rounds/k", [], [b""]), "405",
            "Method Not Allowed"),
    Hostile("a nonce that is none", lambda: ("GET", "/hello?nonce=ab", [], [b""]), "422", "nonce: "),
    Hostile("a route that is not there", lambda: ("GET", "/adapters", [], [b""]), "404", "GET /adapters: Not Found"),
    Hostile("another method", lambda: ("DELETE", "/hello", [], [b""]), "405", "DELETE /hello: Method Not Allowed"),
]  # fmt: skip


def order(key: str = "k", **plan: Any) -> dict[str, Any]:
    return {"key": key, "base": "b", "parent": "p", "round": 1, "plan": {"rank": 2, "steps": 1, "seconds": 1, **plan}}
