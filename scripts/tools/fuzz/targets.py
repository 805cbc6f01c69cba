"""`targets`: parts of umbel that read bytes from outside, each with valid inputs that `scripts/fuzz` damages."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel

from client.data import examples
from scripts.tools.fuzz.target import Target, damaging
from server.registry import version_dir
from server.registry.alias_log import AliasLog, Move
from serving.aliases import AliasTable
from serving.router.asgi import MESSAGES
from serving.router.router import GENERATING, Router
from strategies import records
from umbel import messages, peft_dir, secret_file, signing, token_file, wire
from umbel.adapter import AdapterManifest, Lifecycle
from umbel.site import file as site_file
from umbel.site.config import SiteConfig
from umbel.token_file import TokenFile

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 5), "model.layers.0.mlp.down_proj": (5, 8)}
RANK, KEY, VOCAB = 2, "k" * 64, 512
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
MODELS: list[type[BaseModel]] = [
    messages.Hello, messages.RoundReport, messages.ShadowReport, messages.Submit, messages.Shadow, messages.RoundQuery,
    messages.VersionQuery, messages.AdapterQuery, messages.LiveVersion, messages.Failure, AdapterManifest,
]  # fmt: skip
SITE = b"""[site]
name = "clinic-a"
state_dir = "state"
[model]
path = "base"
[[adapter]]
name = "support"
[engine]
port = 30000
extra_args = { max_total_tokens = 20000 }
[slo]
ttft_ms = 400.5
[training]
data = "train.jsonl"
[[shadow.guard]]
name = "g"
data = "g.jsonl"
"""


def targets(folder: Path) -> list[Target]:
    """Return all targets; the files that they read lie in `folder`."""
    every: list[tuple[str, list[bytes], Callable[[bytes], object]]] = [
        ("message", _messages(), _read_message),
        ("records", _messages(), _read_records),
        ("adapter", [_adapter(np.float32), _adapter(ml_dtypes.bfloat16)], _read_adapter),
        ("manifest", [peft_dir.encode_manifest(_manifest())], _file(folder / "v000001", _read_manifests)),
        ("alias log", [_moves(folder)], _file(folder / "aliases.jsonl", lambda path: AliasLog(path).aliases())),
        ("alias table", [_table().model_dump_json().encode()], _Tables(folder)),
        ("router", _requests(), _Requests(folder)),
        ("site file", [SITE], _file(folder / "site.toml", _read_site)),
        ("example", _examples(), lambda data: examples.parse(data, "fuzz:1")),
        ("token file", [_tokens(folder)], _file(folder / "train.npy", _read_tokens)),
        ("API keys", [b"# eva\nsk-0123456789abcdef\n"], _file(folder / "keys", secret_file.read_keys)),
        ("public key", [_public_key()], _file(folder / "centre.pub", signing.read_public)),
    ]
    return [Target(name, damaging(seeds), read) for name, seeds, read in every]


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Turn a reader of files into a reader of bytes, which writes them to `path` first."""

    def write_and_read(data: bytes) -> object:
        if path.name.startswith("v0"):
            path.mkdir(exist_ok=True)
            (path / peft_dir.MANIFEST).write_bytes(data)
            return read(path)
        path.write_bytes(data)
        path.chmod(0o600)
        return read(path)

    return write_and_read


def _manifest() -> AdapterManifest:
    blob = _adapter(np.float32)
    return AdapterManifest(
        name="support", version=1, digest=peft_dir.digest(blob), base="0" * 64, lineage="l", round=1, rank=RANK,
        target_modules=("q_proj",), weights={"a": 0.5}, left_out={"b": "NaN"}, counts={"a": {"num-examples": 3}},
    )  # fmt: skip


def _messages() -> list[bytes]:
    plan = messages.TrainPlan(rank=2, steps=3, seconds=1.0)
    order = messages.RoundOrder(key="l-1-p", base="b", parent="p", round=1, plan=plan)
    made: list[BaseModel] = [
        messages.RoundReport(key="k", state=messages.JobState.DONE, parent="p", steps=3, loss_sum=1.25, rank=2),
        messages.ShadowReport(ref="support@v1", state=Lifecycle.PROBING),
        messages.Submit(adapter="support", order=order),
        messages.Shadow(manifest=_manifest(), signature="0" * 128),
        messages.RoundQuery(adapter="support", key="k", fetch=True),
        messages.Failure(error="EngineError: x", final=False),
        _manifest(),
    ]
    return [wire.pack_model(model) for model in made]


def _read_message(data: bytes) -> None:
    kind, _ = wire.unpack(data)
    for model in MODELS:
        if model.__name__ == kind:
            wire.unpack_model(data, model)


def _read_records(data: bytes) -> None:
    """Read the same bytes as a message, and as the adapter beside it."""
    array = Array(dtype="uint8", shape=(len(data),), stype=records.STYPE, data=data)
    content = RecordDict({"body": ConfigRecord({"message": data}), "adapter": ArrayRecord({"adapter": array})})
    records.unpack_adapter(content)
    kind, _ = wire.unpack(data)
    records.unpack(content, next((model for model in MODELS if model.__name__ == kind), messages.Hello))


def _adapter(dtype: Any) -> bytes:
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in SHAPES.items():
        tensors[peft_dir.key(module, "A")] = np.ones((RANK, inner), dtype)
        tensors[peft_dir.key(module, "B")] = np.ones((out, RANK), dtype)
    return peft_dir.encode(tensors)


def _read_adapter(data: bytes) -> None:
    peft_dir.validate(peft_dir.decode(data), SHAPES, rank=RANK, max_rank=8)


def _read_manifests(directory: Path) -> None:
    """Read a manifest as the registry does, as a site does, and as a signature covers it."""
    (directory / peft_dir.CONFIG).write_bytes(peft_dir.encode_config(_manifest(), base="b"))
    manifest, _ = version_dir.read_manifest(directory)
    signing.canonical(manifest)
    str(manifest.ref)
    (directory / peft_dir.WEIGHTS).write_bytes(_adapter(np.float32))
    peft_dir.read(directory)


def _moves(folder: Path) -> bytes:
    log = AliasLog(folder / "seed.jsonl")
    for version in (0, 1, 2):
        log.append(Move(at="2026-01-01T00:00:00Z", to={"head": version, "live": version}, who="eva", why="x"))
    return log.path.read_bytes()


def _table() -> AliasTable:
    adapters: Any = {"support": {"live": "support@v2", "previous": "support@v1", "shadow": None}}
    return AliasTable(base="tiny", adapters=adapters, addressable=("support@v2", "support@v1"))


class _Requests:
    """Sends bodies to the router, without SGLang; every answer has a documented status and its route's form."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "aliases.json"
        _table().write(self.file)
        self.router = Router(_answer_ok, self.file, KEY, VOCAB)

    def __call__(self, data: bytes) -> None:
        for path in sorted(GENERATING):
            status, body = asyncio.run(self.send(path, data))
            assert status in (200, 400, 404), status
            form = {"message", "type"} if path == MESSAGES else {"message", "type", "param", "code"}
            assert status == 200 or set(json.loads(body)["error"]) == form

    async def send(self, path: str, data: bytes) -> tuple[int, bytes]:
        incoming = [{"type": "http.request", "body": data}]
        answer: list[Any] = []

        async def receive() -> Any:
            return incoming.pop() if incoming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answer.append(message)

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        await self.router({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
        return answer[0]["status"], answer[-1]["body"]


class _Tables(_Requests):
    """Gives the router alias tables: it keeps the old one if it cannot read it, else it resolves every name in it."""

    def __call__(self, data: bytes) -> None:
        self.file.write_bytes(data)
        status, _ = asyncio.run(self.send("/umbel/aliases", b""))
        assert status in (200, 500), status
        assert self.router.table is not None
        for name in self.router.table.names():
            self.router.table.resolve(name)


async def _answer_ok(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def _requests() -> list[bytes]:
    chat: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "ü"}], "priority": "batch"}
    bodies = [
        chat,
        {"model": "tiny", "prompt": ["a", "b"], "stream": True},
        {"model": "x@v1", "prompt": [1, 2], "n": 2, "best_of": 2, "logprobs": 2, "logit_bias": {"7": -2.5}},
        {**chat, "tools": [_TOOL], "tool_choice": "required", "stop": ["a"], "seed": 3, "top_logprobs": 2},
        {"model": "tiny", "input": [{"role": "user", "content": "a"}], "text": {"format": {"type": "json_object"}}},
        {"model": "tiny", "max_tokens": 3, "system": "a", "messages": [{"role": "user", "content": "b"}]},
    ]
    return [json.dumps(body).encode() for body in bodies]


def _read_site(path: Path) -> None:
    site_file.read(path)
    SiteConfig.load(path)


def _examples() -> list[bytes]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"messages": turns}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "b"}]
    return [json.dumps(line).encode() for line in lines]


def _tokens(folder: Path) -> bytes:
    token_file.write(folder / "seed.npy", [((1, 2, 3), (-100, 2, 3))], seq_len=8, pad_id=0)
    return (folder / "seed.npy").read_bytes()


def _read_tokens(path: Path) -> None:
    opened = TokenFile.open(path)
    assert len(opened) >= 0
    opened.loss_tokens()


def _public_key() -> bytes:
    return (
        b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAeDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDA=\n"
        b"-----END PUBLIC KEY-----\n"
    )
