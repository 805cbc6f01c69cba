"""A site's control API over a real Unix socket, whose training is one vector addition. For tests of the Flower side."""

import base64
from collections.abc import Callable
from pathlib import Path
from socketserver import UnixStreamServer
from urllib.parse import parse_qsl

import numpy as np

from tests.toys.sites.socket_server import serve
from umbel import peft_dir, signing
from umbel.adapter import AdapterManifest, Lifecycle
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.packed import Packing
from umbel.messages import (
    Decision,
    Evaluation,
    Hello,
    JobState,
    LiveVersion,
    Restored,
    RoundOrder,
    RoundReport,
    ShadowReport,
    Submit,
    Verdict,
)
from umbel.statements import HelloStatement, UpdateStatement, VerdictStatement

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 5), "model.layers.0.self_attn.v_proj": (4, 5)}
BASE = BaseFingerprint(weights="w", config="c", quantization="q", tokenizer="t", chat_template="x")


class ToySite:
    """State of one site; attributes may be changed by a test while it serves."""

    held = 10
    """Distinct examples that it says it holds."""
    steps = 0
    """Steps that it says it did; 0: all."""
    skips = ""
    """Why nothing is worth training here; empty where it trains."""
    changes = 0
    """Times that it has changed its examples."""
    kin = ""
    packing: Packing = ""
    waits: frozenset[str] = frozenset()
    """Seconds that calls asked to be held."""

    def __init__(self, name: str, socket: Path, *, step: float = 0.5, polls: int = 1) -> None:
        self.name = name
        self.socket = socket
        self.step = step
        """Added to every element of B by training."""
        self.polls = polls
        """Questions about a round or a probe before it is done; -1: done when the order is answered."""
        self.base = BASE
        self.shapes = SHAPES
        self.max_lora_rank = 16
        self.tokens = 100
        self.accepts = True
        self.otherwise: Decision = "reject"
        """The decision where it does not accept."""
        self.hurt = lambda tensors: tensors
        """Applied to the update before it is sent."""
        self.fail_with: tuple[int, str] | None = None
        self.nonsense = False
        self.calls: list[tuple[str, str]] = []
        self.live: str | None = None
        self.previous: str | None = None
        self.went_back_from: list[str] = []
        """By itself, or told to by the centre's `rollback`."""
        self.gone: set[str] = set()
        """Versions that were live, and whose weights were removed."""
        self.orders: dict[str, RoundOrder] = {}
        self.shadows: dict[str, ShadowReport] = {}
        self.manifests: dict[str, AdapterManifest] = {}
        self.signatures: dict[str, str] = {}
        """Version → the signature that came with it; empty for none."""
        self.key: signing.PrivateKey | None = None
        """With which it signs its updates, hellos and verdicts."""
        self.tamper: Callable[[RoundReport], RoundReport] = lambda report: report
        """Applied to a finished round's report after it was signed."""
        self.submits: list[Submit] = []
        """Every order as it came, with its signature."""
        self.shadow_polls: int | None = None
        """As `polls`, for probes; None for the same."""
        self._parents: dict[str, bytes] = {}
        self._asked: dict[str, int] = {}
        self._server: UnixStreamServer | None = None

    def __enter__(self) -> "ToySite":
        self._server = serve(self, self.socket)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self.socket.unlink(missing_ok=True)

    def hello(self, adapter: str = "support") -> Hello:
        return Hello(
            site=self.name, adapter=adapter, fingerprint=self.base, kin=self.kin, packing=self.packing,
            shapes=self.shapes, dtype="bfloat16", max_lora_rank=self.max_lora_rank, train_examples=10, eval_examples=5,
            live=self.live, refused=tuple(self.refused), data_changes=self.changes,
        )  # fmt: skip

    @property
    def refused(self) -> list[str]:
        return [ref for ref, report in self.shadows.items() if report.state == "rejected"] + self.went_back_from

    def accepts_base(self, base: str, kin: str) -> bool:
        return base == self.base.digest or (kin != "" and kin == self.kin)

    def submit(self, order: RoundOrder, parent: bytes) -> RoundReport | tuple[int, str]:
        if not self.accepts_base(order.base, order.kin):
            return 422, "BaseMismatch"
        ranks = {a.shape[0] for a, _ in peft_dir.factors(peft_dir.decode(parent)).values()}
        if order.parent != peft_dir.digest(parent) or ranks - {order.plan.rank} or order.plan.rank > self.max_lora_rank:
            return 422, "AdapterError"
        known = self.orders.setdefault(order.key, order)
        if known != order:
            return 409, "Conflict"
        self._parents.setdefault(order.key, parent)
        return self.report(order.key, asked=0)

    def report(self, key: str, *, asked: int = 1) -> RoundReport | tuple[int, str]:
        if key not in self.orders:
            return 404, "NotFound"
        self._asked[key] = self._asked.get(key, 0) + asked
        order = self.orders[key]
        if self._asked[key] <= self.polls:
            return RoundReport(key=key, state=JobState.RUNNING, parent=order.parent, live=self.live)
        done = self._done(key, order)
        if self.key is not None:
            signature = signing.sign(self.key, UpdateStatement.of(self.name, order, done))
            done = done.model_copy(update={"signature": signature})
        return self.tamper(done.model_copy(update={"live": self.live}))

    def _done(self, key: str, order: RoundOrder) -> RoundReport:
        if self.skips:
            return RoundReport(key=key, state=JobState.SKIPPED, parent=order.parent, error=self.skips)
        return RoundReport(
            key=key, state=JobState.DONE, parent=order.parent, steps=self.steps or order.plan.steps, num_examples=8,
            num_loss_tokens=self.tokens, held_examples=self.held, held_loss_tokens=10 * self.held,
            loss_sum=2.5 * self.tokens, seconds=1.0, share=0.5,
            update=peft_dir.digest(self.update(key)), rank=order.plan.rank,
        )  # fmt: skip

    def parent(self, round: int) -> bytes:
        """Return the parent that it received in a round."""
        return next(self._parents[key] for key, order in self.orders.items() if order.round == round)

    def update(self, key: str) -> bytes:
        tensors = peft_dir.decode(self._parents[key])
        for name, array in tensors.items():
            if ".lora_B." in name:
                tensors[name] = (array.astype(np.float32) + self.step).astype(array.dtype)
        return peft_dir.encode(self.hurt(tensors))

    def shadow(self, manifest: AdapterManifest, blob: bytes) -> ShadowReport | tuple[int, str]:
        if not self.accepts_base(manifest.base, manifest.kin):
            return 422, "BaseMismatch"
        if peft_dir.digest(blob) != manifest.digest or manifest.rank > self.max_lora_rank:
            return 422, "AdapterError"
        ref = str(manifest.ref)
        self.manifests[ref] = manifest
        self.gone.discard(ref)
        self.shadows.setdefault(ref, ShadowReport(ref=ref, state=Lifecycle.PROBING))
        return self.shadow_report(ref, asked=0)

    def shadow_report(self, ref: str, *, asked: int = 1) -> ShadowReport | tuple[int, str]:
        if ref not in self.shadows:
            return 404, "NotFound"
        self._asked[ref] = self._asked.get(ref, 0) + asked
        polls = self.polls if self.shadow_polls is None else self.shadow_polls
        if self.shadows[ref].verdict is None and self._asked[ref] > polls:
            probe = Evaluation(loss_sum=10.0, loss_tokens=10, exact=1, examples=5)
            decision = "promote" if self.accepts else self.otherwise
            reasons = ("held-out loss 1.00, live 1.20",)
            verdict = Verdict(accepted=self.accepts, decision=decision, reasons=reasons)
            self.shadows[ref] = ShadowReport(
                ref=ref, state=Lifecycle.JUDGED, probe={"base": probe, "shadow": probe}, verdict=verdict,
                load_s=0.1, probe_s=0.2,
            )  # fmt: skip
        return self.shadows[ref]

    def promote(self, ref: str) -> ShadowReport | tuple[int, str]:
        if ref not in self.shadows:
            return 404, "NotFound"
        report = self.shadows[ref]
        in_favour = report.verdict is not None and report.verdict.accepted
        if report.state is not Lifecycle.LIVE and not (report.state is Lifecycle.JUDGED and in_favour):
            return 409, "Conflict"
        self.let_answer(ref)
        return self.shadows[ref]

    def discard(self, ref: str) -> ShadowReport | tuple[int, str]:
        if ref not in self.shadows:
            return 404, "NotFound"
        if self.shadows[ref].state in (Lifecycle.LIVE, Lifecycle.RETIRED):
            return 422, "AdapterError"
        return self._settle(ref, Lifecycle.REJECTED)

    def roll_back(self, instead_of: str | None = None) -> LiveVersion:
        """By this site itself, where nobody says what `instead_of`."""
        if self.live is not None and instead_of in (None, self.live):
            self.went_back_from.append(self.live)
            self.let_answer(self.previous)
        return LiveVersion(live=self.live)

    def restore(self, ref: str | None) -> Restored | tuple[int, str]:
        if ref is None:
            self.let_answer(None)
            return Restored(live=None, state=None)
        if ref in self.refused:
            return 409, "Conflict"
        report = self.shadow_report(ref)
        state = report.state if isinstance(report, ShadowReport) and ref not in self.gone else None
        if state is Lifecycle.JUDGED and not self.shadows[ref].verdict.accepted:  # type: ignore[union-attr]
            return 409, "Conflict"
        if state in (Lifecycle.JUDGED, Lifecycle.RETIRED):
            self.let_answer(ref)
            state = Lifecycle.LIVE
        return Restored(live=self.live, state=state)

    def let_answer(self, ref: str | None) -> None:
        if ref == self.live:
            return
        if self.live in self.shadows:
            self._settle(self.live, Lifecycle.RETIRED)
        if ref is not None and ref in self.shadows:
            self._settle(ref, Lifecycle.LIVE)
        self.live, self.previous = ref, self.live

    def _settle(self, ref: str, state: Lifecycle) -> ShadowReport:
        self.shadows[ref] = self.shadows[ref].model_copy(update={"state": state})
        return self.shadows[ref]

    def sign_hello(self, hello: Hello, nonce: str) -> Hello:
        if self.key is None:
            return hello
        signature = signing.sign(self.key, HelloStatement.of(nonce, hello))
        return hello.model_copy(update={"signature": signature})

    def sign_verdict(self, report: ShadowReport | tuple[int, str], nonce: str) -> ShadowReport | tuple[int, str]:
        if self.key is None or isinstance(report, tuple):
            return report
        statement = VerdictStatement.of(self.name, nonce, self.manifests[report.ref], report)
        return report.model_copy(update={"signature": signing.sign(self.key, statement)})

    def route(self, method: str, path: str, headers: dict[str, str], body: bytes) -> object:  # noqa: C901 - one table
        path, _, query = path.partition("?")
        asked = dict(parse_qsl(query))
        nonce = asked.get("nonce", "")
        self.calls.append((method, path))
        self.waits |= {asked["wait"]} if "wait" in asked else set()
        if self.fail_with is not None:
            return self.fail_with
        match [method, *path.strip("/").split("/")]:
            case ["GET", "hello"]:
                return self.sign_hello(self.hello(asked["adapter"]), nonce)
            case ["POST", "adapters", name, "rounds", _]:
                order = RoundOrder.model_validate_json(base64.b64decode(headers["x-umbel-order"]))
                self.submits.append(Submit(adapter=name, order=order, signature=headers["x-umbel-signature"]))
                return self.submit(order, body)
            case ["GET", "adapters", _, "rounds", key]:
                return self.report(key)
            case ["GET", "adapters", _, "rounds", key, "update"]:
                return self.update(key)
            case ["POST", "adapters", _, "shadow"]:
                manifest = AdapterManifest.model_validate_json(base64.b64decode(headers["x-umbel-manifest"]))
                self.signatures[str(manifest.ref)] = headers.get("x-umbel-signature", "")
                return self.sign_verdict(self.shadow(manifest, body), nonce)
            case ["GET", "adapters", ref, "shadow"]:
                return self.sign_verdict(self.shadow_report(ref), nonce)
            case ["POST", "adapters", ref, "promote"]:
                return self.promote(ref)
            case ["POST", "adapters", ref, "discard"]:
                return self.discard(ref)
            case ["POST", "adapters", _, "rollback"]:
                return self.roll_back(asked.get("instead_of"))
            case ["POST", "adapters", _, "restore"]:
                return self.restore(asked.get("ref"))
        return 404, "NotFound"
