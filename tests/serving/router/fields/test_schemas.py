"""Schemas that SGLang compiles: which keywords they may have, and how many of them."""

from typing import Any

import pytest

from serving.router.fields import schemas
from serving.router.fields.routes import checked
from serving.router.fields.schemas import grammar
from umbel.errors import RequestRefused

ROOM: dict[str, Any] = {
    "$defs": {"Ward": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Ward"}, "id": {"enum": [1, "2"]}}}},
    "type": "object", "title": "Room", "additionalProperties": False, "required": ["ward"],
    "properties": {
        "ward": {"anyOf": [{"$ref": "#/$defs/Ward"}, {"type": "null"}], "default": None},
        "beds": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
        "since": {"type": "string", "format": "date"}, "name": {"type": ["string", "null"], "maxLength": 40},
    },
}  # fmt: skip
"""As pydantic writes them."""


def test_an_ordinary_schema_is_compiled() -> None:
    assert grammar(ROOM, "schema", 512) is ROOM


@pytest.mark.parametrize(
    "schema",
    [3, [], {"pattern": "a"}, {"patternProperties": {}}, {"not": {}}, {"if": {}}, {"multipleOf": 3},
     {"uniqueItems": True}, {"maxLength": 257}, {"maxLength": -1}, {"maxLength": True}, {"minItems": 1001},
     {"maxItems": 1e3}, {"minItems": 2, "maxItems": 1}, {"minimum": 1e300}, {"exclusiveMinimum": True}, {"type": "x"},
     {"type": {}}, {"type": [3]}, {"format": "regex"}, {"format": []}, {"format": "date", "maxLength": 9}, {"enum": []},
     {"enum": 3}, {"enum": ["x"] * 2001}, {"required": "a"}, {"required": [{}]}, {"items": 3}, {"anyOf": []},
     {"anyOf": 3}, {"properties": []}, {"properties": {str(i): {} for i in range(129)}}, {"title": "\0"},
     {"anyOf": [{"maxLength": 200}, {"maxLength": 200}]},
     {"anyOf": [{"title": str(i)} for i in range(1001)]}, {"description": "x" * 70_000},
     {"$ref": "#"}, {"$ref": "#/nothing"}, {"$ref": "file:///etc/passwd"}, {"$ref": {}},
     {"$ref": "#/default", "default": {"pattern": "a"}}, {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
     {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
     {"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}, "anyOf": [{"$ref": "#"}]}],
)  # fmt: skip
def test_what_cannot_be_compiled_at_a_known_cost_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(RequestRefused, match="'schema"):
        grammar(schema, "schema", 512)


def test_depth_is_bounded() -> None:
    deep: Any = {}
    for _ in range(schemas.MOST_NODES):
        deep = {"items": deep}
    with pytest.raises(RequestRefused, match="nested deeper than 64"):
        grammar(deep, "schema", 512)


@pytest.mark.parametrize(
    ("strict", "choice", "compiled"),
    [(None, None, False), (False, "auto", False), (True, "auto", True), (None, "required", True),
     (None, {"type": "function", "function": {"name": "f"}}, True), (None, "none", False)],
)  # fmt: skip
def test_a_functions_schema_is_held_to_that_only_where_it_is_compiled(
    strict: bool | None, choice: Any, compiled: bool
) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"pattern": "^a+$"}}}, "strict": strict}
    request = {"tools": [{"type": "function", "function": function}], "tool_choice": choice}
    if compiled:
        with pytest.raises(RequestRefused, match=r"'tools\[0\].function.parameters.properties.a.pattern' is a keyword"):
            checked("/v1/chat/completions", request, 512)
    else:
        assert checked("/v1/chat/completions", request, 512)["tools"][0]["function"]["parameters"]


def test_what_is_only_shown_cannot_hold_up_sglangs_own_check_either() -> None:
    for parameters in ({"required": [{"a": 1}, {"b": 1}]}, {"dependentRequired": {"a": [{}]}}, {"title": "x" * 70_000}):
        request = {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}
        with pytest.raises(RequestRefused, match="parameters"):
            checked("/v1/chat/completions", request, 512)
