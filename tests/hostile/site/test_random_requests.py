"""The requests that `scripts/fuzz --engine` sends: every field of every route, and only what the router takes."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from scripts.tools.fuzz.bodies import TOKENS, bodies, spoiled
from scripts.tools.fuzz.engine import Asked
from serving.router.fields.routes import ROUTES, checked
from umbel.errors import RequestRefused

VOCAB = 512


def drawn(inputs: st.SearchStrategy[Any], count: int) -> list[Any]:
    found = []

    @seed(1)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck),
              phases=(Phase.generate,))  # fmt: skip
    @given(inputs)
    def once(one: Any) -> None:
        found.append(one)

    once()
    return found


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_of_a_route_is_sent_and_taken(path: str) -> None:
    found = drawn(bodies(path, ["tiny", "support"], VOCAB), 600)
    sent = Counter(field for body in found for field in checked(path, body, VOCAB))
    route = ROUTES[path]
    assert set(sent) == {"model", *route.fields} - route.dropped
    lengths = [max((body.get(name) or 1 for name in TOKENS), default=1) for body in found]
    assert sum(length > 8 for length in lengths) < len(found) / 8, "most are answered with few tokens"


@pytest.mark.parametrize("path", ROUTES)
def test_a_spoiled_request_is_taken_or_refused(path: str) -> None:
    answers = Counter[bool]()
    for body in drawn(spoiled(bodies(path, ["tiny"], VOCAB)), 150):
        try:
            checked(path, body, VOCAB)
            answers[True] += 1
        except RequestRefused:
            answers[False] += 1
    assert min(answers[True], answers[False]) > 10, answers


def test_a_request_is_saved_with_bytes_that_are_no_text() -> None:
    asked = Asked("/v1/completions", b'{"a": "\xff"}'.decode(errors="surrogateescape"), leaves=2)
    assert Asked.read(asked.write()).body.encode(errors="surrogateescape") == b'{"a": "\xff"}'
    assert Asked.read(asked.write()).leaves == 2
