"""Limits of a request: fields and values that are refused, values that may go on, and the messages."""

from typing import Any

import pytest

from serving.router.limits import MOST, MOST_PROMPTS, NOT_FOR_USERS, refusal
from serving.router.router import Router
from tests.toys.serving.router import Inner, generate


def test_an_unknown_priority_is_refused(router: Router, inner: Inner) -> None:
    reply = generate(router, "support", priority="urgent")
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "'priority' is 'urgent'; use 'interactive', 'batch', or a number."
    assert inner.paths == []


@pytest.mark.parametrize(("field", "most"), MOST.items())
def test_a_number_may_reach_its_limit_and_no_more(field: str, most: int) -> None:
    assert refusal({"model": "support", field: most}) is None
    assert refusal({"model": "support", field: most + 1}) == (f"'{field}' is over {most}; ask for less.", field)
    assert refusal({"model": "support", field: float("nan")}) is not None
    assert refusal({"model": "support", field: "1"}) == (f"'{field}' is a string; send a number.", field)
    assert refusal({"model": "support", field: None}) is None


@pytest.mark.parametrize("field", NOT_FOR_USERS)
def test_a_field_of_sglangs_own_is_refused_unless_it_asks_for_nothing(field: str) -> None:
    for nothing in (None, False):
        assert refusal({field: nothing}) is None
    for something in (True, 7, "", "x", {}):
        said = refusal({field: something})
        assert said is not None
        assert said[1] == field


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_a_list_of_texts_is_counted_and_a_list_of_token_ids_is_one_prompt(field: str) -> None:
    token_ids: list[Any] = list(range(100_000))
    for fits in ("x" * 100_000, token_ids, ["x"] * MOST_PROMPTS, [token_ids] * 2, None):
        assert refusal({field: fits}) is None
    said = refusal({field: ["x"] * (MOST_PROMPTS + 1)})
    assert said == (f"'{field}' holds more than {MOST_PROMPTS} texts; send several requests.", field)


@pytest.mark.parametrize("priority", ["interactive", "batch", 3, None])
def test_a_known_priority_may_go_on(priority: object) -> None:
    assert refusal({"priority": priority}) is None
