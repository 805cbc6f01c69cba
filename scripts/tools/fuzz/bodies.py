"""`bodies`, `spoiled`: random requests to a route, made from the router's own tables of fields.

A field's check (serving/router/fields) is a function that a maker made (`integer(0, 20)`): the maker's name and its
arguments say what the field takes. So a new field is sent by itself, at its bounds too; only a new maker, or a check
that no maker made, has to be entered in MAKERS.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from scripts.tools.fuzz.schemas import JSON, TEXTS, deep, rarely, schemas
from serving.router.fields.responses import LEAST_OUTPUT, MOST_METADATA
from serving.router.fields.routes import ROUTES, checked
from serving.router.fields.sampling import LONGEST_STOP, MOST_ANSWERS, MOST_BIASES, MOST_STOPS, MOST_TOP_K
from serving.router.fields.values import Check
from umbel.errors import RequestRefused

Values = st.SearchStrategy[Any]

ASKED = ("messages", "prompt", "input")
"""What is asked: fields without which a route answers nothing."""
TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ANSWERS = ("n", "best_of")
SCHEMAS = ("parameters", "input_schema")
"""Fields of tools whose check comes later, as it needs the whole request (`require_schemas`)."""
LONG = 5000
"""Characters of a long text where the check has no bound: more than the tiny base's context."""
EXTREMES = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, -(2**31) - 1, 2**53 + 1, 2**63, 10**30, "",
    "0", "\0", "x" * 70_000, [], {}, [[]], [None], [{}], {"": {}}, {"type": "x"}, deep(70),
    ["a"] * 2000, list(range(2000)),
]  # fmt: skip
"""What a damaged body has in place of a value."""


def values(check: Check, vocab: int, big: bool = True) -> Values:
    """Return what a check takes; with `big`, long texts and lists at their bounds are rarely among it."""
    maker = MAKERS[check.__qualname__.partition(".")[0]]
    return maker(vocab, big, **inspect.getclosurevars(check).nonlocals)


def _integer(vocab: int, big: bool, low: int, high: int) -> Values:
    edges = sorted({one for one in (low, low + 1, 0, 1, 2, 7, high - 1, high) if low <= one <= high})
    return st.sampled_from(edges) | st.integers(low, high)


def _number(vocab: int, big: bool, low: float, high: float, above: bool) -> Values:
    edges = {float(one) for one in (low, low + 1e-9, 5e-324, 0, 0.5, 1, high) if low <= one <= high}
    return st.sampled_from(sorted(edges - {low} if above else edges)) | st.floats(low, high, exclude_min=above)


def _text(vocab: int, big: bool, most: int | None, least: int) -> Values:
    longest = min(most or LONG, LONG)
    short = [one for one in TEXTS if least <= len(one) <= longest]
    often = st.sampled_from(short) | st.text(min_size=least, max_size=min(12, longest))
    return rarely(st.sampled_from("aü\U0001f469 ").map(lambda one: one * longest), often) if big else often


def _array(vocab: int, big: bool, item: Check, most: int, least: int) -> Values:
    often = st.lists(values(item, vocab, big), min_size=least, max_size=min(most, 3))
    return rarely(values(item, vocab, False).map(lambda one: [one] * most), often) if big else often


def _record(vocab: int, big: bool, fields: Mapping[str, Check], dropped: frozenset[str], needed: Any) -> Values:
    known = {name: schemas() if name in SCHEMAS else values(one, vocab, big) for name, one in fields.items()}
    return _some(known | dict.fromkeys(sorted(dropped), JSON), tuple(needed), most=4)


def _by_type(vocab: int, big: bool, kinds: Mapping[str, Check], otherwise: str | None) -> Values:
    def typed(kind: str) -> Values:
        found = values(kinds[kind], vocab, big)
        with_type = found.map(lambda one: {**one, "type": kind})
        return rarely(found.map(lambda one: _without(one, "type")), with_type) if kind == otherwise else with_type

    return st.one_of([typed(kind) for kind in kinds])


def _token_ids(vocab: int, big: bool, most: int, least: int) -> Values:
    token = st.sampled_from((0, 1, 4, vocab - 1)) | st.integers(0, vocab - 1)
    return st.lists(token, min_size=least, max_size=min(most, 16 if most > MOST_STOPS else most))


def _prompt(vocab: int, big: bool) -> Values:
    one, ids = _text(vocab, big, None, 1), _token_ids(vocab, big, LONG, 1)
    several = st.lists(one, min_size=1, max_size=3) | st.lists(ids, min_size=1, max_size=3)
    return one | ids | rarely(one.map(lambda text: [text[:8]] * MOST_ANSWERS), several)


def _logit_bias(vocab: int, big: bool) -> Values:
    bias = st.sampled_from((-100, 100, 0, -0.5)) | st.floats(-100, 100)
    token = st.sampled_from((0, 4, vocab - 1)) | st.integers(0, vocab - 1)
    many = bias.map(lambda one: {str(token): one for token in range(min(vocab, MOST_BIASES))})
    return rarely(many, st.dictionaries(token.map(str), bias, max_size=4))


def _metadata(vocab: int, big: bool) -> Values:
    return st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=MOST_METADATA)


def _grammar(vocab: int, big: bool) -> Values:
    return schemas(compiled=True)


MAKERS: dict[str, Callable[..., Values]] = {
    "integer": _integer,
    "number": _number,
    "flag": lambda vocab, big: st.booleans(),
    "only": lambda vocab, big, wanted, reason: st.just(wanted),
    "text": _text,
    "choice": lambda vocab, big, allowed: st.sampled_from(allowed),
    "array": _array,
    "record": _record,
    "by_type": _by_type,
    "text_or": lambda vocab, big, other: _text(vocab, big, None, 0) | values(other, vocab, big),
    "token_ids": _token_ids,
    "free": lambda vocab, big, most_bytes: rarely(st.just(deep(60)), JSON),
    "mapping": lambda vocab, big: st.dictionaries(st.sampled_from(TEXTS), JSON, max_size=3),
    "grammar": _grammar,
    "described": lambda vocab, big: schemas(),
    "stop": lambda vocab, big: (
        _text(vocab, big, LONGEST_STOP, 0) | st.lists(_text(vocab, big, LONGEST_STOP, 0), max_size=MOST_STOPS)
    ),
    "stop_texts": lambda vocab, big: st.lists(_text(vocab, big, LONGEST_STOP, 0), max_size=MOST_STOPS),
    "top_k": lambda vocab, big: _integer(vocab, big, -1, MOST_TOP_K),
    "logit_bias": _logit_bias,
    "metadata": _metadata,
    "prompt": _prompt,
    "_or_word": lambda vocab, big, other, word: values(word, vocab, big) | values(other, vocab, big),
}
"""Name of a maker of checks, or of a check → what such a check takes."""


@st.composite
def _some(draw: Any, known: dict[str, Values], needed: tuple[str, ...], most: int) -> dict[str, Any]:
    """Draw an object with what is needed of some known fields, and up to `most` others; null among them."""
    others = [name for name in known if name not in needed]
    drawn = draw(st.lists(st.sampled_from(others), unique=True, max_size=most)) if others else []
    nullable = {name: rarely(st.none(), known[name]) for name in drawn}
    return {name: draw(one) for name, one in ({name: known[name] for name in needed} | nullable).items()}


def _without(one: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key != name}


def bodies(path: str, names: list[str], vocab: int) -> Values:
    """Return requests that the router takes: what is asked of one of the models `names`, and up to ten fields."""
    route = ROUTES[path]
    known = {name: values(check, vocab) for name, check in route.fields.items()}
    known |= dict.fromkeys(sorted(route.dropped - route.fields.keys()), JSON) | {"model": st.sampled_from(names)}
    needed = ("model", *(name for name in ASKED if name in known))
    return _quick(_some(known, needed, most=10), next(name for name in TOKENS if name in known)).filter(
        lambda body: _taken(path, body, vocab)
    )


@st.composite
def _quick(draw: Any, whole: Values, length: str) -> dict[str, Any]:
    """Draw a request of few tokens, but for one in 16, which is for one answer as long as it wants to have it."""
    body = draw(whole)
    if draw(rarely(st.just(True), st.just(False))):
        return {**body, **{name: 1 for name in ANSWERS if name in body}}
    short = st.integers(LEAST_OUTPUT if length == "max_output_tokens" else 1, 8)
    several = {name: rarely(st.just(body[name]), st.integers(1, 3)) for name in ANSWERS if body.get(name)}
    return {**body, **{name: draw(short) for name in (length, *TOKENS) if name == length or body.get(name)},
            **{name: draw(one) for name, one in several.items()}}  # fmt: skip


def _taken(path: str, body: dict[str, Any], vocab: int) -> bool:
    try:
        checked(path, body, vocab)
    except RequestRefused:  # fields that each are taken, and not together
        return False
    return True


@st.composite
def spoiled(draw: Any, whole: Values) -> Any:
    """Draw a request in which up to three values, anywhere, are replaced, taken out or put into a list."""
    body = copy.deepcopy(draw(whole))
    for _ in range(draw(st.integers(1, 3))):
        inside: Any = body
        while inside:
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
            if isinstance(inside[key], dict | list) and inside[key] and draw(st.booleans()):
                inside = inside[key]
                continue
            change = draw(st.sampled_from(("replace", "replace", "delete", "list")))
            if change == "delete":
                del inside[key]
            else:
                inside[key] = [inside[key]] if change == "list" else copy.deepcopy(draw(st.sampled_from(EXTREMES)))
            break
    return body
