"""`schemas`, `JSON`: random JSON schemas, made from the router's own lists of keywords, and random JSON."""

from typing import Any

from hypothesis import strategies as st

from serving.router.fields import schemas as known
from serving.router.fields.values import INT64
from umbel.errors import RequestRefused

Values = st.SearchStrategy[Any]

TEXTS = [
    "f", "a", "ward 3", "", " ", "\0", "\r\n", "ü", "\U0001f469\u200d\U0001f4bb", "\u202e", "\ufffd", "<|end|>",
    "<|assistant|>", "{{ 7 * 7 }}", "{% raw %}", "\\", '"', "%s%n", "{}", '{"a": 1}', "</think>", "\x1b[2J",
]  # fmt: skip
WORDS = sorted(
    known.ONE | known.MANY | known.NAMED | known.COUNTS | known.LENGTHS | known.NUMBERS | known.SAID
    | {"type", "enum", "const", "format", "required", "$ref"}
)  # fmt: skip
NAMES = ("a", "f", "", "ü", '"', "\\")
DEPTH = 3
OFTEN = 16
"""What is rare comes once in so many draws."""


def rarely(rare: Values, often: Values) -> Values:
    """Draw from the first once in OFTEN times, else from the second."""
    return st.sampled_from(range(OFTEN)).flatmap(lambda drawn: rare if drawn == OFTEN - 1 else often)


def deep(levels: int) -> Any:
    """Return lists in lists."""
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-INT64, INT64) | st.floats(-1e18, 1e18) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)


def schemas(compiled: bool = False) -> Values:
    """Return schemas; if they are to be compiled, then only such as the router lets through."""
    made = _schema(DEPTH)
    return made.filter(_taken) if compiled else made


def _taken(schema: Any) -> bool:
    try:
        known.grammar(schema, "schema", 0)
    except RequestRefused:
        return False
    return True


@st.composite
def _schema(draw: Any, depth: int) -> Any:
    """Draw a schema as people write them, or one of a few keywords that need not belong together."""
    if depth < DEPTH and draw(rarely(st.just(True), st.just(False))):
        return draw(st.booleans())
    if depth and draw(st.booleans()):
        schema = draw(_usual(depth))
    else:
        words = draw(st.lists(st.sampled_from(WORDS), unique=True, max_size=4))
        schema = {word: draw(_keyword(word, depth)) for word in words}
    if depth == DEPTH and draw(st.booleans()):
        schema = {**schema, "$defs": {"f": draw(_schema(1))}}
    return schema


@st.composite
def _usual(draw: Any, depth: int) -> dict[str, Any]:
    kind = draw(st.sampled_from(("object", "object", "array", "anyOf", "enum", *sorted(known.TYPES))))
    if kind == "object":
        properties = draw(st.dictionaries(st.sampled_from(NAMES), _schema(depth - 1), max_size=3))
        closed = {"additionalProperties": False, "required": list(properties)} if draw(st.booleans()) else {}
        return {"type": "object", "properties": properties, **closed}
    if kind == "array":
        return {"type": "array", "items": draw(_schema(depth - 1)), **draw(_bounds("minItems", "maxItems", 5))}
    if kind == "string":
        return {"type": "string", **draw(_bounds("minLength", "maxLength", known.MOST_LENGTH // 8))}
    if kind in ("integer", "number"):
        return {"type": kind, **draw(_bounds("minimum", "maximum", known.MOST_NUMBER))}
    if kind == "anyOf":
        return {"anyOf": draw(st.lists(_schema(depth - 1), min_size=1, max_size=3))}
    return {"enum": draw(st.lists(JSON, min_size=1, max_size=4))} if kind == "enum" else {"type": kind}


@st.composite
def _bounds(draw: Any, low: str, high: str, most: int) -> dict[str, Any]:
    drawn = sorted(draw(st.lists(st.sampled_from((0, 1, most)) | st.integers(0, most), min_size=2, max_size=2)))
    bounds: tuple[dict[str, Any], ...] = ({}, {low: drawn[0]}, {high: drawn[1]}, {low: drawn[0], high: drawn[1]})
    chosen: dict[str, Any] = draw(st.sampled_from(bounds))
    return chosen


def _keyword(word: str, depth: int) -> Values:
    inner = _schema(depth - 1) if depth else st.booleans()
    if word in known.ONE:
        return inner
    if word in known.MANY:
        return st.lists(inner, min_size=1, max_size=3)
    if word in known.NAMED:
        return st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    if word in known.COUNTS | known.LENGTHS:
        return st.sampled_from((0, 1, 2, 8)) | st.integers(0, 40)
    if word in known.NUMBERS:
        edges = st.sampled_from((0, -1, 0.5, known.MOST_NUMBER, -known.MOST_NUMBER))
        return edges | st.floats(-known.MOST_NUMBER, known.MOST_NUMBER)
    by_word = {
        "type": st.sampled_from(sorted(known.TYPES)) | st.lists(st.sampled_from(sorted(known.TYPES)), max_size=3),
        "format": st.sampled_from(sorted(known.FORMATS)), "enum": st.lists(JSON, min_size=1, max_size=4),
        "required": st.lists(st.sampled_from(NAMES), max_size=3), "$ref": st.sampled_from(("#/$defs/f", "#")),
    }  # fmt: skip
    return by_word.get(word, JSON)
