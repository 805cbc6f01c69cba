"""Keys of adapters: a name that a key does not open is, in all that users can ask, as if it did not exist."""

import json
import secrets
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.aliases import AliasTable
from serving.priorities import Priority
from serving.router.api_keys import ALL, Access, ApiKeys
from serving.router.router import GENERATING, Router
from serving.run_dir import RouterSettings
from tests.toys.engine import site_config
from tests.toys.serving.router import ADMIN, CHAT, KEY, VOCAB, Inner, ask
from umbel.site.adapter_sections import AdapterSection, ServeSection

SITE, SUPPORT, TRIAGE, BOTH = (f"sk-{name}-0123456789" for name in ("site", "support", "triage", "both"))
TENANTS = AliasTable(
    base="tiny",
    adapters={
        "support": {"live": "support@v2", "previous": "support@v1", "shadow": "support@v3"},
        "triage": {"live": "triage@v5", "previous": None, "shadow": None},
        "billing": {"live": None, "previous": None, "shadow": None},
        "open": {"live": "open@v1", "previous": None, "shadow": None},
    },
    addressable=("support@v2", "support@v1", "triage@v5", "open@v1"),
)
OWN = {"support": [SUPPORT, BOTH], "triage": [TRIAGE, BOTH], "billing": [BOTH]}
SHARED = {"tiny", "open", "open@v1", "open@live"}
OF = {
    "support": {"support", "support@v2", "support@v1", "support@live", "support@previous"},
    "triage": {"triage", "triage@v5", "triage@live"}, "billing": {"billing"},
}  # fmt: skip
SEEN = {
    SITE: SHARED, SUPPORT: SHARED | OF["support"], TRIAGE: SHARED | OF["triage"],
    BOTH: SHARED | OF["support"] | OF["triage"] | OF["billing"],
}  # fmt: skip


@pytest.fixture
def router(inner: Inner, tmp_path: Path) -> Router:
    TENANTS.write(tmp_path / "aliases.json")
    classes = {"triage": "batch", "support": "interactive"}
    return Router(inner, tmp_path / "aliases.json", KEY, VOCAB, ApiKeys([SITE], OWN), classes)


def send(router: Router, key: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    method = "GET" if body is None else "POST"
    return ask(router, method, path, headers={"authorization": f"Bearer {key}"}, json=body)


def said(reply: httpx.Response, name: str) -> tuple[int, str, dict[str, str]]:
    """Return all that a reply tells, with the name that was asked for taken out."""
    headers = {key: value for key, value in reply.headers.items() if key != "content-length"}
    return reply.status_code, reply.text.replace(name, "NAME"), headers


@pytest.mark.parametrize("key", SEEN, ids=["site", "support", "triage", "both"])
def test_a_key_lists_and_reaches_its_names_the_open_ones_and_no_others(router: Router, inner: Inner, key: str) -> None:
    listed = send(router, key, "/v1/models").json()["data"]
    assert {card["id"] for card in listed} == SEEN[key]
    for name in TENANTS.names():
        inner.paths.clear()
        statuses = {send(router, key, path, {"model": name}).status_code for path in sorted(GENERATING)}
        statuses.add(send(router, key, f"/v1/models/{name}").status_code)
        assert statuses == {200 if name in SEEN[key] else 404}, name
        assert set(inner.paths) == (set(GENERATING) if name in SEEN[key] else set())


@pytest.mark.parametrize("key", [SITE, SUPPORT, TRIAGE], ids=["site", "support", "triage"])
def test_a_name_that_a_key_does_not_open_is_answered_as_one_that_is_not_there(router: Router, key: str) -> None:
    hidden = sorted({*TENANTS.names()} - SEEN[key])
    assert hidden
    for name in hidden:
        nowhere = name.replace(name.partition("@")[0], "nowhere")
        for body in ({}, {"messages": 7}, {"priority": "batch", "max_tokens": -1}, {"no-such-field": 1}):
            for path in sorted(GENERATING):
                there, not_there = (send(router, key, path, {"model": one, **body}) for one in (name, nowhere))
                assert there.status_code == 404
                assert said(there, name) == said(not_there, nowhere)
        there, not_there = (send(router, key, f"/v1/models/{one}") for one in (name, nowhere))
        assert said(there, name) == said(not_there, nowhere)
        told = there.json()["error"]["message"].partition("Available: ")[2].removesuffix(".").split(", ")
        assert set(told) == SEEN[key]


def test_a_request_meets_the_table_of_a_site_without_what_it_does_not_open(router: Router) -> None:
    alone = TENANTS.model_copy(
        update={
            "adapters": {name: TENANTS.adapters[name] for name in ("support", "open")},
            "addressable": ("support@v2", "support@v1", "open@v1"),
        }
    )
    assert TENANTS.without({"triage", "billing"}) == alone
    watched = TENANTS.model_copy(update={"canary": {"support": 0.5}, "mirror": {"support": 1.0}})
    assert watched.without({"support"}) == TENANTS.without({"support"})
    assert TENANTS.without(frozenset()) == TENANTS


def test_a_promotion_is_seen_by_the_keys_that_open_it_and_by_no_others(router: Router, tmp_path: Path) -> None:
    assert send(router, TRIAGE, CHAT, {"model": "triage@v6"}).status_code == 404
    promoted = {**TENANTS.adapters, "triage": {"live": "triage@v6", "previous": "triage@v5", "shadow": None}}
    table = TENANTS.model_copy(update={"adapters": promoted, "addressable": ("triage@v6", "triage@v5")})
    table.write(tmp_path / "aliases.json")
    assert ask(router, "POST", "/umbel/aliases", headers=ADMIN).status_code == 200
    assert send(router, TRIAGE, CHAT, {"model": "triage"}).headers["x-umbel-adapter"] == "triage@v6"
    assert "triage" not in send(router, SUPPORT, "/v1/models").text


def test_every_request_needs_a_key_as_soon_as_one_adapter_has_some(inner: Inner, router: Router) -> None:
    router.keys = ApiKeys(adapters={"support": [SUPPORT]})
    for path, body in (("/v1/models", None), (CHAT, {"model": "tiny"}), ("/metrics", None)):
        assert send(router, SITE, path, body).status_code == 401
        assert send(router, SUPPORT, path, body).status_code == 200
    router.keys = ApiKeys()
    assert send(router, SITE, "/v1/models").status_code == 200, "no file of keys: nobody needs one"


def test_only_who_opens_an_adapter_rates_its_answers(router: Router, inner: Inner) -> None:
    """What was asked for counts: before its first version the base answers for `billing`, whose keys guard it too."""
    opens = {"support": {SUPPORT, BOTH}, "support@v1": {SUPPORT, BOTH}, "billing": {BOTH}, "tiny": set(SEEN)}
    for name, may in opens.items():
        inner.told["id"] = told = f"chatcmpl-{name}"
        answer = send(router, BOTH, CHAT, {"model": name})
        for key in SEEN:
            rated = send(router, key, "/v1/feedback", {"id": told, "rating": "down"})
            if key in may:
                assert rated.json()["umbel_adapter"] == answer.headers["x-umbel-adapter"]
                continue
            unknown = send(router, key, "/v1/feedback", {"id": "chatcmpl-nowhere", "rating": "down"})
            assert (said(rated, told), rated.status_code) == (said(unknown, "chatcmpl-nowhere"), 404)


def test_an_adapter_with_keys_shares_no_cache_with_the_base_that_answers_for_it(router: Router, tmp_path: Path) -> None:
    """Or else every key of the site could tell by the time what the users of `billing` have asked."""

    def cache(model: str) -> object:
        return send(router, BOTH, CHAT, {"model": model, "user": "eva"}).json()["extra_key"]

    assert [cache(name) for name in ("tiny", "open", "support", "support@v1", "billing")] == [None] * 4 + ["billing"]
    first = {**TENANTS.adapters, "triage": {"live": "triage@v5", "previous": None}, "open": {"live": None}}
    table = TENANTS.model_copy(update={"adapters": first, "control": {"triage": 1.0}})
    table.write(tmp_path / "aliases.json")
    assert ask(router, "POST", "/umbel/aliases", headers=ADMIN).status_code == 200
    assert [cache(name) for name in ("triage", "triage@v5", "open")] == ["triage", None, None]


def test_the_admin_sees_all(router: Router) -> None:
    listed = ask(router, "GET", "/v1/models", headers=ADMIN).json()["data"]
    assert [card["id"] for card in listed] == TENANTS.names()


def test_two_keys_in_one_request_open_what_each_of_them_opens(router: Router) -> None:
    headers = {"authorization": f"Bearer {SUPPORT}", "x-api-key": TRIAGE}
    listed = {card["id"] for card in ask(router, "GET", "/v1/models", headers=headers).json()["data"]}
    assert listed == SHARED | OF["support"] | OF["triage"]


def test_a_key_is_compared_with_all_keys_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, real = ApiKeys([SITE], OWN), secrets.compare_digest
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(secrets, "compare_digest", compare)
    for given, closed in (
        (SITE, {"support", "triage", "billing"}), (SUPPORT, {"triage", "billing"}), (BOTH, set()), ("sk-none", None),
    ):  # fmt: skip
        compared.clear()
        access = keys.admit([(b"x-api-key", given.encode())])
        assert access == (None if closed is None else Access(frozenset(closed)))
        assert sorted(compared) == sorted(one.encode() for one in (SITE, SUPPORT, TRIAGE, BOTH))


def test_the_class_of_a_request_that_names_none_is_its_adapters(router: Router) -> None:
    def priority(key: str, model: str, **body: object) -> int:
        return int(send(router, key, CHAT, {"model": model, **body}).json()["priority"])

    assert priority(TRIAGE, "triage") == priority(TRIAGE, "triage@v5") == Priority.BATCH
    assert priority(TRIAGE, "triage", priority="interactive") == Priority.INTERACTIVE
    assert priority(SUPPORT, "support") == priority(SUPPORT, "tiny") == Priority.INTERACTIVE
    assert priority(BOTH, "billing") == Priority.INTERACTIVE, "not in the settings"
    assert priority(SUPPORT, "support", priority="batch") == Priority.BATCH


def test_the_settings_of_a_site_hold_paths_and_classes_and_no_key(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.keys" for name in ("site", "support", "legal")}
    for name, file in files.items():
        file.write_text(f"sk-{name}-0123456789abcdef\n")
        file.chmod(0o600)
    config = site_config(tmp_path)
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"api_keys": files["site"]}),
            "adapter": (
                AdapterSection(name="support", api_keys=files["support"]),
                AdapterSection(name="triage", priority="batch"),
            ),
            "serve": (ServeSection(name="legal", path=tmp_path, api_keys=files["legal"]),),
        }
    )
    RouterSettings.of(config).write(tmp_path)
    written = tmp_path / "router.json"
    assert (written.stat().st_mode & 0o777, "sk-" in written.read_text()) == (0o600, False)
    settings = RouterSettings.read(tmp_path)
    assert settings.priorities == {"support": "interactive", "triage": "batch"}
    keys = ApiKeys.read(settings)

    def closed(name: str) -> Access | None:
        return keys.admit([(b"x-api-key", f"sk-{name}-0123456789abcdef".encode())])

    assert closed("site") == Access(frozenset({"support", "legal"}))
    assert closed("support") == Access(frozenset({"legal"}))
    assert closed("legal") == Access(frozenset({"support"}))
    assert closed("triage") is None
    assert ApiKeys.read(RouterSettings.of(site_config(tmp_path))).admit([]) == ALL
    assert json.loads(written.read_text()).keys() == {"api_keys", "adapter_keys", "priorities"}
