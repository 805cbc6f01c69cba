"""Adapters that are only served, in the router: pinned, counted and listed as versions are, and never compared."""

from pathlib import Path

import pytest

from serving.router.router import GENERATING, Router
from tests.toys.serving.router import ADMIN, CHAT, KEY, TABLE, VOCAB, Inner, ask, generate

LEGAL, NEWER = "legal@sha256:0123456789abcdef", "legal@sha256:fedcba9876543210"


@pytest.fixture
def router(inner: Inner, tmp_path: Path) -> Router:
    file = tmp_path / "aliases.json"
    TABLE.model_copy(update={"served": {"legal": LEGAL}, "canary": {"support": 1.0}}).write(file)
    return Router(inner, file, KEY, VOCAB)


@pytest.mark.parametrize("path", sorted(GENERATING))
@pytest.mark.parametrize("model", ["legal", "tiny:legal"])
def test_a_request_is_pinned_to_it(router: Router, inner: Inner, path: str, model: str) -> None:
    reply = generate(router, model, path)
    assert (reply.json()["lora_path"], reply.json()["model"]) == ("legal-sha256-0123456789abcdef", model)
    assert reply.headers["x-umbel-adapter"] == LEGAL


@pytest.mark.parametrize("model", ["tiny:support", "tiny:support@live"])
def test_sglangs_own_form_is_pinned_to_the_live_version(router: Router, inner: Inner, model: str) -> None:
    router.table = TABLE
    reply = generate(router, model, messages=[{"role": "user", "content": "hello"}])
    assert (reply.json()["lora_path"], reply.headers["x-umbel-adapter"]) == ("support-v2", "support@v2")


def test_a_user_of_sglangs_own_form_is_in_the_canary_as_any_other(router: Router, inner: Inner) -> None:
    for model in ("support", "tiny:support"):
        assert generate(router, model, user="a").headers["x-umbel-adapter"] == "support@v3"
    assert generate(router, "legal", user="a").headers["x-umbel-adapter"] == LEGAL


@pytest.mark.parametrize(
    "model",
    [
        "tiny:tiny:support",
        "tiny:tiny:legal",
        "tiny:support-v3",
        "tiny:support@v3",
        "tiny:legal-sha256-0123456789abcdef",
    ],
)
def test_names_of_the_engine_reach_nothing(router: Router, inner: Inner, model: str) -> None:
    assert generate(router, model).status_code == 404
    assert inner.paths == []


def test_its_answers_are_counted_until_another_has_its_name(router: Router, inner: Inner, tmp_path: Path) -> None:
    async def while_it_answers() -> None:
        assert router.in_flight[LEGAL] == 1

    inner.after = while_it_answers
    for _ in range(3):
        generate(router, "legal", user="a")
    assert ask(router, "POST", "/umbel/aliases", headers=ADMIN).json()["served"] == {"legal": LEGAL}
    counts = ask(router, "GET", "/umbel/traffic", headers=ADMIN).json()["versions"]
    assert {label: count["requests"] for label, count in counts.items()} == {LEGAL: 3}
    TABLE.model_copy(update={"served": {"legal": NEWER}}).write(router.table_file)
    assert ask(router, "POST", "/umbel/aliases", headers=ADMIN).json()["served"] == {"legal": NEWER}
    assert ask(router, "GET", "/umbel/traffic", headers=ADMIN).json()["versions"] == {}
    inner.after = None
    assert generate(router, "legal").headers["x-umbel-adapter"] == NEWER


def test_it_is_never_mirrored(router: Router, inner: Inner) -> None:
    assert router.table is not None
    router.table = router.table.model_copy(update={"canary": {}, "mirror": {"support": 1.0}})
    generate(router, "legal", messages=[{"role": "user", "content": "hello"}])
    assert inner.paths == [CHAT]
    assert router.mirror.report() == {}


def test_cards_are_as_vllm_lists_them(router: Router) -> None:
    cards = {card["id"]: card for card in ask(router, "GET", "/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "support", "legal", "support@v2", "support@v1", "support@live", "support@previous"]
    for name, card in cards.items():
        assert list(card) == ["id", "object", "created", "owned_by", "root", "parent", "umbel_adapter"]
        assert (card["object"], card["parent"]) == ("model", None if name == "tiny" else "tiny")
    assert (cards["legal"]["root"], cards["legal"]["umbel_adapter"]) == (LEGAL, LEGAL)
    assert ask(router, "GET", "/v1/models/tiny:legal").json()["id"] == "legal"
    assert ask(router, "GET", "/v1/models/tiny:legal-sha256-0123456789abcdef").status_code == 404
