"""`Hostile`: one hostile input and the answer it gets; and the inputs that are bytes: adapters, manifests, messages.

The tests in tests/hostile drive them, tests/e2e/test_hostile.py sends some of them to a real site.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import msgpack
import numpy as np

from umbel import peft_dir
from umbel.peft_dir import Tensors

Q = "model.layers.0.self_attn.q_proj"
SHAPES = {Q: (6, 5), "model.layers.0.self_attn.v_proj": (4, 5)}
RANK = 2
A, B = peft_dir.key(Q, "A"), peft_dir.key(Q, "B")


@dataclass(frozen=True)
class Hostile:
    """One input: `make` builds it from a good one (see each list); `answer` is an error's kind or an HTTP status."""

    what: str
    make: Callable[..., Any]
    answer: str
    says: str
    """Regular expression that the message matches: it has to say what is wrong, where, and what to do."""


def good(dtype: Any = np.float32, seed: int = 0, rank: int = RANK) -> Tensors:
    """Make an adapter of these shapes as the catalogue's readers accept it."""
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module, (out, inner) in SHAPES.items():
        tensors[peft_dir.key(module, "A")] = generator.standard_normal((rank, inner)).astype(dtype)
        tensors[peft_dir.key(module, "B")] = generator.standard_normal((out, rank)).astype(dtype)
    return tensors


def put(name: str, array: Any) -> Callable[[Tensors], bytes]:
    """Add a tensor, or replace the one of that name."""
    return lambda tensors: peft_dir.encode({**tensors, name: np.asarray(array)})


def spoiled(value: float) -> Callable[[Tensors], bytes]:
    def make(tensors: Tensors) -> bytes:
        array = tensors[B].copy()
        array[1, 1] = value
        return peft_dir.encode({**tensors, B: array})

    return make


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Tensors], bytes]:
    """Change the header and leave the bytes below it as they are."""

    def make(tensors: Tensors) -> bytes:
        blob = peft_dir.encode(tensors)
        length = struct.unpack("<Q", blob[:8])[0]
        fields = json.loads(blob[8 : 8 + length])
        edit(fields)
        return raw(json.dumps(fields).encode(), blob[8 + length :])

    return make


def raw(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def twice(tensors: Tensors) -> bytes:
    """Name one tensor twice in the header, the second time with other offsets."""
    blob = peft_dir.encode(tensors)
    length = struct.unpack("<Q", blob[:8])[0]
    entry = json.dumps({A: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})[1:-1].encode()
    return raw(b"{" + entry + b"," + blob[9 : 8 + length], blob[8 + length :])


def zipped(tensors: Tensors) -> bytes:
    """Zip a pickle of the tensors, as `torch.save` does."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            zipfile.ZipInfo("archive/data.pkl"),
            pickle.dumps([(name, tensors[name].tobytes()) for name in sorted(tensors)]),
        )
    return file.getvalue()


def renamed(name: str) -> Callable[[Tensors], bytes]:
    return lambda tensors: peft_dir.encode({name if key == A else key: array for key, array in tensors.items()})


def recast(dtype: Any) -> Callable[[Tensors], bytes]:
    return lambda tensors: peft_dir.encode({name: array.astype(dtype) for name, array in tensors.items()})


NOT_SAFE = "adapter: not a safetensors file"
ADAPTERS = [  # made from the tensors of a good one
    Hostile("a NaN", spoiled(np.nan), "AdapterError", r"q_proj\.lora_B holds NaN or infinity"),
    Hostile("infinity", spoiled(np.inf), "AdapterError", r"q_proj\.lora_B holds NaN or infinity"),
    Hostile("64-bit numbers", recast(np.float64), "AdapterError", "is F64; expected one of F32, F16, BF16"),
    Hostile("integers", recast(np.int8), "AdapterError", "is I8; expected one of"),
    Hostile("a transposed factor", lambda t: peft_dir.encode({**t, A: np.ascontiguousarray(t[A].T)}),
            "AdapterError", r"lora_A has shape \[5, 2\], the base needs \[2, 5\]|modules have ranks"),
    Hostile("a factor that would broadcast", lambda t: peft_dir.encode({**t, B: t[B][:1]}), "AdapterError",
            r"lora_B has shape \[1, 2\], the base needs \[6, 2\]"),
    Hostile("a scalar", put(A, np.float32(1)), "AdapterError", r"lora_A has shape \[1\]|modules have ranks"),
    Hostile("rank 0", lambda t: peft_dir.encode({k: v[:0] if ".lora_A" in k else v[:, :0] for k, v in t.items()}),
            "AdapterError", r"shape \[0, 5\]|rank is 0|rank 0 is not within"),
    Hostile("a higher rank than was agreed", lambda t: peft_dir.encode(good(t[A].dtype, rank=3)), "AdapterError",
            r"shape \[3, 5\], the base needs \[2, 5\]|rank is 3"),
    Hostile("a module that is not adapted", put(peft_dir.key("lm_head", "A"), np.zeros((2, 5), np.float32)),
            "AdapterError", "lm_head has only lora_A; both factors are needed"),
    Hostile("both factors of such a module", lambda t: peft_dir.encode(
        {**t, peft_dir.key("lm_head", "A"): t[A], peft_dir.key("lm_head", "B"): t[B]}),
        "AdapterError", "has lm_head, which is not adapted here"),
    Hostile("a module that is missing", lambda t: peft_dir.encode({A: t[A], B: t[B]}), "AdapterError",
            "lacks .*v_proj"),
    Hostile("an extra tensor", put("base_model.model.lm_head.weight", np.zeros(3, np.float32)), "AdapterError",
            "lm_head.weight is not a LoRA factor"),
    Hostile("a tensor `alpha`, to scale the rest", put(f"base_model.model.{Q}.alpha", np.float32(1e9)),
            "AdapterError", "q_proj.alpha is not a LoRA factor"),
    Hostile("a path in a tensor's name", renamed("../../etc/passwd"), "AdapterError", "passwd is not a LoRA factor"),
    Hostile("a line break in a tensor's name", renamed(f"{A}\nroot"), "AdapterError", "is not a LoRA factor"),
    Hostile("a header of 2^63 bytes", lambda t: raw(b"{}", length=1 << 63), "AdapterError", NOT_SAFE),
    Hostile("a header that is not there", lambda t: raw(b"", length=8), "AdapterError", NOT_SAFE),
    Hostile("a header nested 100 000 deep", lambda t: raw(b'{"a":' * 100_000), "AdapterError", NOT_SAFE),
    Hostile("offsets that overlap", header(lambda h: h[A].update(data_offsets=h[B]["data_offsets"])), "AdapterError",
            NOT_SAFE),
    Hostile("offsets beyond the end", header(lambda h: h[A].update(data_offsets=[0, 1 << 40])),
            "AdapterError", NOT_SAFE),
    Hostile("a shape whose size overflows", header(lambda h: h[A].update(shape=[1 << 62, 1 << 62])), "AdapterError",
            NOT_SAFE),
    Hostile("a name twice", twice, "AdapterError", "is in its header twice"),
    Hostile("a zip with a pickle, as of torch.save", zipped, "AdapterError", NOT_SAFE),
    Hostile("a pickle", lambda t: pickle.dumps(sorted(t)), "AdapterError", NOT_SAFE),
    Hostile("half a file", lambda t: peft_dir.encode(t)[:-7], "AdapterError", NOT_SAFE),
    Hostile("16 MB of zeros behind it", lambda t: peft_dir.encode(t) + bytes(1 << 24), "AdapterError",
            f"{NOT_SAFE}|bytes, the parent only"),
    Hostile("nothing at all", lambda t: b"", "AdapterError", NOT_SAFE),
]  # fmt: skip

SIGNED = "its signature is not by the trusted key, or its manifest was changed"
MANIFESTS = [  # (manifest, what signs) → (header's JSON, signature); the site trusts a key
    Hostile("no signature", lambda m, sign, other: (m, ""), "AdapterError", "it is not signed; the centre signs with"),
    Hostile("another key's signature", lambda m, sign, other: (m, other(m)), "AdapterError", SIGNED),
    Hostile("a change after signing", lambda m, sign, other: ({**m, "round": 9}, sign(m)), "AdapterError", SIGNED),
    Hostile("an old version as a new one", lambda m, sign, other: ({**m, "version": 9}, sign(m)),
            "AdapterError", SIGNED),
    Hostile("a version under another name", lambda m, sign, other: ({**m, "name": "other"}, sign(m)), "AdapterError",
            SIGNED),
    Hostile("a name with a path", lambda m, sign, other: ({**m, "name": "../x"}, sign(m)), "AdapterError",
            "cannot name an adapter|signature"),
    Hostile("a signature that is no hex", lambda m, sign, other: (m, "zz" * 64), "AdapterError", SIGNED),
    Hostile("NaN for a number", lambda m, sign, other: ({**m, "rank": float("nan")}, sign(m)), "WireError",
            "x-umbel-manifest: AdapterManifest: rank: "),
    Hostile("a negative version", lambda m, sign, other: ({**m, "version": -1}, sign(m)), "WireError", "version: "),
    Hostile("a field of another release", lambda m, sign, other: ({**m, "exec": "x"}, sign(m)), "WireError",
            "exec: Extra inputs are not permitted"),
    Hostile("JSON nested 10 000 deep", lambda m, sign, other: ("[" * 10_000, ""), "WireError",
            "Invalid JSON|recursion"),
    Hostile("a rank above the engine's", lambda m, sign, other: ({**m, "rank": 99}, sign({**m, "rank": 99})),
            "AdapterError", "rank 99 is not within 1..4.*raise .engine..max_lora_rank"),
    Hostile("another base", lambda m, sign, other: ({**m, "base": "f" * 64}, sign({**m, "base": "f" * 64})),
            "BaseMismatch", "this site holds .*; copy the same model directory"),
    Hostile("other weights than it names", lambda m, sign, other: ({**m, "digest": "f" * 64},
            sign({**m, "digest": "f" * 64})), "AdapterError", "its bytes are not those of its manifest; send it again"),
]  # fmt: skip


def message(**fields: Any) -> bytes:
    body = {"schema": 1, "kind": "RoundReport", "key": "k", "state": "done", "parent": "p", **fields}
    return bytes(msgpack.packb(body))


MESSAGES = [  # the bytes of a RoundReport
    Hostile("half a message", lambda: message()[:-3], "WireError", "not a msgpack message"),
    Hostile("nested 5000 deep", lambda: b"\x91" * 5000 + b"\xc0", "WireError", "not a msgpack message"),
    Hostile(
        "a map that says it has 2^32 entries", lambda: b"\xdf\xff\xff\xff\xff", "WireError", "not a msgpack message"
    ),
    Hostile("a timestamp far outside of time", lambda: b"\x81\xa1x\xc7\x0c\xff" + b"\xff" * 12, "WireError", "not a"),
    Hostile("an extension type for a field", lambda: message(steps=msgpack.ExtType(5, b"x")), "WireError", "steps: "),
    Hostile("over a megabyte", lambda: message(error="x" * (1 << 20)), "WireError", "over the limit of"),
    Hostile("another schema", lambda: message(schema=2), "WireError", "run the same umbel release on both sides"),
    Hostile("another kind", lambda: message(kind="Hello"), "WireError", "expected a RoundReport, got a Hello"),
    Hostile("a negative count", lambda: message(num_loss_tokens=-5), "WireError", "num_loss_tokens: .*greater than"),
    Hostile("an infinite time", lambda: message(seconds=float("inf")), "WireError", "seconds: .*finite"),
    Hostile("a field too many", lambda: message(weight=1e9), "WireError", "weight: Extra inputs are not permitted"),
]
