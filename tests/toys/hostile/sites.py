"""The catalogue's hostile sites: their replies to the centre, orders out of order, and site files."""

from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.toys.hostile.catalogue import Hostile
from umbel import signing
from umbel.statements import HelloStatement, VerdictStatement

Site = Any
"""A `tests.toys.site.ToySite`, which only Flower's environment can import."""


def told(**changes: Any) -> Callable[[Site], None]:
    """Change the reports of a site's rounds without checks, as a site of another make might send them."""

    def spoil(site: Site) -> None:
        honest = site.report

        def report(key: str, *, asked: int = 1) -> Any:
            found = honest(key, asked=asked)
            return found if isinstance(found, tuple) else found.model_copy(update=changes)

        site.report = report

    return spoil


def judged(**changes: Any) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        honest = site.shadow_report

        def report(ref: str, *, asked: int = 1) -> Any:
            found = honest(ref, asked=asked)
            return found if isinstance(found, tuple) else found.model_copy(update=changes)

        site.shadow_report = report

    return spoil


def said(**changes: Any) -> Callable[[Site], None]:
    def spoil(site: Site) -> None:
        hello = site.hello().model_copy(update=changes)
        site.hello = lambda adapter: hello

    return spoil


def hurt(change: Callable[[Any], Any]) -> Callable[[Site], None]:
    return lambda site: setattr(site, "hurt", lambda tensors: {name: change(t) for name, t in tensors.items()})


def replayed(site: Site) -> None:
    """Report an update of an earlier round: it was trained from another parent."""
    told(parent="0" * 64)(site)


def dead(site: Site) -> None:
    site.fail_with = (500, "RuntimeError")


def babbling(site: Site) -> None:
    site.nonsense = True


REPLIES = [  # what makes an honest toy site hostile; the others' round goes on, and says why it is left out
    Hostile("an answer for another round", told(key="l-9-p"), "left out", "answered for round 'l-9-p', asked was"),
    Hostile("a negative count", told(num_examples=-1), "left out", "not answer with a RoundReport|num_examples"),
    Hostile("no tokens, and an update", told(num_loss_tokens=0), "left out", "0 tokens; nothing to weigh it by"),
    Hostile("more examples than the plan allows", told(num_examples=10**9), "left out", "the plan allows 16"),
    Hostile("more tokens than its examples can hold", told(num_loss_tokens=10**12), "left out",
            "an example has at most"),
    Hostile("no step, and an update", told(steps=0), "left out", "claims 0 optimizer steps"),
    Hostile("more steps than the plan allows", told(steps=10**6), "left out", "the plan allows 1 to 4"),
    Hostile("no data, and an update", told(held_examples=0), "left out", "claims to hold 0 examples"),
    Hostile("more data than a site holds", told(held_examples=10**9, held_loss_tokens=10**10), "left out",
            "a site holds 1 to"),
    Hostile("more tokens than its data can hold", told(held_loss_tokens=10**12), "left out", "an example has at most"),
    Hostile("an infinite loss", told(loss_sum=float("inf")), "left out", "its training loss is inf"),
    Hostile("an infinite time", told(seconds=float("inf")), "left out", "RoundReport|seconds"),
    Hostile("another digest than its update's", told(update="0" * 64), "left out", "not the one it reported"),
    Hostile("another rank than its update's", told(rank=1), "left out", "its rank is 2, it reported 1"),
    Hostile("an update of an older version", replayed, "left out", "trained from 000000000000, this round's parent is"),
    Hostile("an update of NaN", hurt(lambda t: np.full_like(t, np.nan)), "left out", "holds NaN or infinity"),
    Hostile("an update of 10^30", hurt(lambda t: np.full_like(t, 1e30)), "left out", "far outside what training makes"),
    Hostile("an update of another shape", hurt(lambda t: t[:, :1].copy()), "left out", "shape|modules have ranks"),
    Hostile("an update of 64-bit numbers", hurt(lambda t: t.astype(np.float64)), "left out", "F64; expected one of"),
    Hostile("layers of 2^40 columns", said(shapes={"q_proj": (1 << 40, 5)}), "left out", "Hello|other layers"),
    Hostile("a name with a path", said(site="../../root"), "left out", "cannot name a site"),
    Hostile("errors, whatever it is asked", dead, "left out", "RuntimeError"),
    Hostile("empty answers, whatever it is asked", babbling, "left out", "did not answer with a"),
    Hostile("a verdict on another version", judged(ref="support@v99"), "left out",
            "answered for support@v99, asked was"),
    Hostile("a version's name with a line break", judged(ref="support@v1\nclinic-b: ok"), "left out", "ShadowReport"),
    Hostile("a live version that drives a terminal", said(live="\x1b[2J"), "left out", "Hello"),
]  # fmt: skip

OTHER = Ed25519PrivateKey.from_private_bytes(bytes([7] * 32))
THEN = "0" * 64
"""A nonce of another time."""


def proved(hello: bool, key: Any = None, nonce: str = "", **changes: Any) -> Callable[[Site], None]:
    """Have a site sign its hellos (or else its verdicts) with another key, for another nonce, or with `changes`."""

    def spoil(site: Site) -> None:
        def sign(answer: Any, asked: str) -> Any:
            if isinstance(answer, tuple):
                return answer
            if hello:
                statement: Any = HelloStatement.of(nonce or asked, answer)
            else:
                statement = VerdictStatement.of(site.name, nonce or asked, site.manifests[answer.ref], answer)
            signature = signing.sign(key or site.key, statement.model_copy(update=changes))
            return answer.model_copy(update={"signature": signature})

        setattr(site, "sign_hello" if hello else "sign_verdict", sign)

    return spoil


NOT_ITS_HELLO = "site c: the hello's signature is not by this site's key, or is for another question"
NOT_ITS_VERDICT = "support@v1: the verdict's signature is not by this site's key, or is for another question, version"
SIGNED = [  # as REPLIES, where the centre has the sites' keys
    Hostile("a hello without a signature", lambda s: setattr(s, "sign_hello", lambda hello, nonce: hello), "left out",
            "site c: the hello is not signed; the site signs with `.site..signing_key`"),
    Hostile("a hello that another key signed", proved(True, OTHER), "left out", NOT_ITS_HELLO),
    Hostile("a hello of another time", proved(True, nonce=THEN), "left out", NOT_ITS_HELLO),
    Hostile("another site's name", lambda s: setattr(s, "name", "a"), "left out",
            "site a: the hello's signature is not by this site's key"),
    Hostile("a name that the centre has no key for", lambda s: setattr(s, "name", "ghost"), "left out",
            "ghost has no key in .*; put its public one there, as ghost.pub"),
    Hostile("a verdict without a signature", lambda s: setattr(s, "sign_verdict", lambda report, nonce: report),
            "left out", "support@v1: the verdict is not signed; the site signs with"),
    Hostile("a verdict that another key signed", proved(False, OTHER), "left out", NOT_ITS_VERDICT),
    Hostile("a verdict of another time", proved(False, nonce=THEN), "left out", NOT_ITS_VERDICT),
    Hostile("a verdict on another registry's version", proved(False, lineage="other"), "left out", NOT_ITS_VERDICT),
    Hostile("a verdict on other weights", proved(False, digest="f" * 64), "left out", NOT_ITS_VERDICT),
    Hostile("another site's verdict", proved(False, site="a"), "left out", NOT_ITS_VERDICT),
]  # fmt: skip

Steps = tuple[tuple[str, str], ...]
"""(method, path) of calls of the control API, after version 1 was promoted and 2 was pushed and judged."""
ORDERS = [  # → steps; the last one is the one that is answered so
    Hostile("collect before submit", lambda: (("GET", "/adapters/support/rounds/k"),), "404",
            "round k is not known at this site; submit it again"),
    Hostile("an update before its round", lambda: (("GET", "/adapters/support/rounds/k/update"),), "404",
            "round k is not"),
    Hostile("promote before shadow", lambda: (("POST", "/adapters/support@v9/promote"),), "404", "push it as a shadow"),
    Hostile("discard before shadow", lambda: (("POST", "/adapters/support@v9/discard"),), "404", "push it as a shadow"),
    Hostile("discard after promote", lambda: (("POST", "/adapters/support@v1/discard"),), "409",
            "support@v1 is live.*cannot be discarded.*umbel rollback"),
    Hostile("promote after discard", lambda: (("POST", "/adapters/support@v2/discard"),
            ("POST", "/adapters/support@v2/promote")), "409", "only a judged shadow can be promoted"),
    Hostile("a promotion that is forced", lambda: (("POST", "/adapters/support@v2/promote?forced=true"),), "404",
            "has no parameter 'forced' on this socket"),
    Hostile("a promotion against the site's verdict", lambda: (("POST", "/adapters/support@v2/promote"),), "409",
            "this site's own verdict is keep"),
    Hostile("promote twice", lambda: (("POST", "/adapters/support@v1/promote"),) * 2, "200", "live"),
    Hostile("discard twice", lambda: (("POST", "/adapters/support@v2/discard"),) * 2, "200", "rejected"),
    Hostile("roll back another adapter", lambda: (("POST", "/adapters/other/rollback"),), "404", "trains no adapter"),
]  # fmt: skip


def edit(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


FILES = [  # made from the text of a good one
    Hostile("a key that is misspelt", edit("port =", "prot ="), "ConfigError",
            "engine.prot is not a setting; did you mean"),
    Hostile("a table that is unknown", lambda t: t + "[engin]\nport = 1\n", "ConfigError",
            "engin is not a setting; did"),
    Hostile("a text for a number", edit("30000", '"many"'), "ConfigError",
            "engine.port: Input should be a valid integer"),
    Hostile("a port outside of all", edit("30000", "70000"), "ConfigError",
            "engine.port: .*less than or equal to 65535"),
    Hostile("a number for a table", lambda t: "engine = 3\n" + t.partition("[engine]")[0], "ConfigError", "engine: "),
    Hostile("single brackets", edit("[[adapter]]", "[adapter]"), "ConfigError", r"write \[\[adapter"),
    Hostile("infinity", lambda t: t + "[slo]\nttft_ms = inf\n", "ConfigError", "slo.ttft_ms: .*finite number"),
    Hostile("NaN", lambda t: t + "[slo]\ntpot_ms = nan\n", "ConfigError", "slo.tpot_ms: .*finite number"),
    Hostile("a negative time", lambda t: t + "[slo]\ntpot_ms = -1\n", "ConfigError", "slo.tpot_ms: .*greater than 0"),
    Hostile("an adapter with a path for a name", edit('"support"', '"../x"'), "ConfigError", "cannot name an adapter"),
    Hostile("a site with a path for a name", edit('"clinic-a"', '"../x"'), "ConfigError", "site.name: "),
    Hostile("a base called as its adapter", edit('path = "base"', 'path = "base"\nserved_name = "support"'),
            "ConfigError", "model.served_name and adapter.0.name are both 'support'"),
    Hostile("a base called as a version", edit('path = "base"', 'path = "base"\nserved_name = "a@v1"'), "ConfigError",
            "model.served_name: 'a@v1' cannot name the base"),
    Hostile("a flag that opens the engine", lambda t: t + '[engine.extra_args]\napi-key = "x"\n', "ConfigError",
            "api-key is set by umbel; remove it here"),
    Hostile("a flag that runs users' code",
            lambda t: t + "[engine.extra_args]\nenable_custom_logit_processor = true\n", "ConfigError",
            "enable_custom_logit_processor = True cannot be served"),
    Hostile("a null byte in a path", edit('"state"', '"st\\u0000ate"'), "ConfigError",
            "site.state_dir holds a null byte"),
    Hostile("a home that nobody has", edit('"base"', '"~nobody-at-all/base"'), "ConfigError", "no base model here"),
    Hostile("TOML nested 100 000 deep", lambda t: "a = " + "[" * 100_000, "ConfigError", "not TOML: "),
    Hostile("bytes that are no text", lambda t: b"\xff\xfe" + t.encode(), "ConfigError", "not TOML: .*utf-8"),
    Hostile("a table twice", lambda t: t + "[site]\n", "ConfigError", "not TOML: Cannot declare"),
    Hostile("nothing at all", lambda t: "", "ConfigError", "site is missing"),
]  # fmt: skip
