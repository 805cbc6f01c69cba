"""`grammar`, `described`: JSON schemas that SGLang compiles into a grammar, and those that it only shows the model.

SGLang compiles in threads of its scheduler, has no limit on their time and keeps the result for good. So a schema that
is compiled has only keywords whose cost is known (measured with 150 000 tokens: `maxLength` 20 ms of CPU for each
character, optional properties quadratic), in numbers whose sum stays at seconds of one core.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from serving.router.fields.values import Check, free, refuse

MOST_BYTES = 64 << 10
"""Characters of a schema."""
MOST_NODES = 1000
"""Schemas within a schema that is compiled."""
MOST_PROPERTIES = 128
"""Properties of one object, of which each may be left out."""
MOST_VALUES = 2000
"""Values of all `enum` together."""
MOST_LENGTH = 256
"""Characters that all `minLength` and `maxLength` of a schema count together."""
MOST_ITEMS = 1000
"""Highest `minItems`, `maxItems`, `minProperties`, `maxProperties`."""
MOST_NUMBER = 2**53
"""Highest bound of a number."""

ONE = frozenset({"additionalProperties", "items", "unevaluatedProperties", "unevaluatedItems", "propertyNames"})
MANY = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
NAMED = frozenset({"properties", "$defs", "definitions"})
COUNTS = frozenset({"minItems", "maxItems", "minProperties", "maxProperties"})
LENGTHS = frozenset({"minLength", "maxLength"})
NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
SAID = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$comment",
    "nullable", "$id", "discriminator",
})  # fmt: skip
"""Keywords that a grammar does not have."""
ALSO = frozenset({"anyOf", "oneOf", "allOf"})
"""Keywords whose schemas describe the same value as the schema that they are in, as `$ref` does."""
PAIRS = tuple((f"min{what}", f"max{what}") for what in ("Items", "Properties", "Length", "imum"))
FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer", "relative-json-pointer",
    "time", "uri", "uri-reference", "uri-template", "uuid",
})  # fmt: skip
TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})


def described(value: Any, where: str, vocab: int) -> dict[str, Any]:
    """Take a schema that is only shown to the model: any keyword, in bounds that SGLang's own check bears."""
    if not isinstance(value, dict):
        refuse(where, "is no JSON schema", "send an object")
    free(MOST_BYTES)(value, where, vocab)
    for node in _objects(value):
        dependent = node.get("dependentRequired")
        names = [("required", node.get("required")), ("type", node.get("type"))]
        names += list(dependent.items()) if isinstance(dependent, dict) else []
        for word, found in names:  # a list of other things would be compared each with each
            if isinstance(found, list) and not all(isinstance(one, str) for one in found):
                refuse(f"{where}.{word[:100]}", "holds something else than texts", "send a list of texts")
    return value


def grammar(value: Any, where: str, vocab: int) -> dict[str, Any]:
    """Take a schema that is compiled."""
    schema = described(value, where, vocab)
    if "\\u0000" in json.dumps(schema):
        refuse(where, "holds a null byte", "leave it out")
    _Walk(where, schema).all()
    return schema


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object within JSON."""
    open_ = [value]
    while open_:
        one = open_.pop()
        if isinstance(one, dict):
            yield one
            open_ += one.values()
        elif isinstance(one, list):
            open_ += one


@dataclass
class _Walk:
    """Goes through every schema within one, and adds up what compiling it costs."""

    where: str
    root: dict[str, Any]
    schemas: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Every schema that was looked at, by its `id()`."""
    values: int = 0
    length: int = 0

    def all(self) -> None:
        """Check every schema; raise RequestRefused for the first that is not taken."""
        open_: list[tuple[Any, str]] = [(self.root, self.where)]
        while open_:
            schema, where = open_.pop()
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, dict):
                refuse(where, "is no JSON schema", "send an object")
            self.schemas[id(schema)] = schema
            if len(self.schemas) > MOST_NODES:
                refuse(self.where, f"holds more than {MOST_NODES} schemas", "send a smaller one")
            for word, value in schema.items():
                if word == "format" and schema.get("type") in ("integer", "number"):
                    continue  # int32, double and the like: a grammar has none for numbers
                open_ += self._keyword(word, value, f"{where}.{word[:100]}")
            _require_together(schema, where)
        self._require_ends()

    def _keyword(self, word: str, value: Any, where: str) -> list[tuple[Any, str]]:
        """Check one keyword; return the schemas in it."""
        if word in ONE:
            return [(value, where)]
        if word in MANY:
            if not isinstance(value, list) or not value:
                refuse(where, "is no list of schemas", "send a list")
            return [(one, f"{where}[{index}]") for index, one in enumerate(value)]
        if word in NAMED:
            if not isinstance(value, dict) or (word == "properties" and len(value) > MOST_PROPERTIES):
                refuse(where, f"is no object of at most {MOST_PROPERTIES} schemas", "send a smaller one")
            return [(one, f"{where}.{key[:100]}") for key, one in value.items()]
        if word in COUNTS | LENGTHS:
            self._count(word, value, where)
        elif word == "enum":
            self.values += len(value) if isinstance(value, list) else 0
            if not isinstance(value, list) or not value or self.values > MOST_VALUES:
                refuse(where, f"is no list of values, all together at most {MOST_VALUES}", "send fewer")
        else:
            _require_plain(word, value, where)
        return []

    def _count(self, word: str, value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_ITEMS:
            refuse(where, f"is no whole number up to {MOST_ITEMS}", "leave it out, and say it in the description")
        self.length += value if word in LENGTHS else 0
        if self.length > MOST_LENGTH:
            remedy = "leave it out, and say it in the description"
            refuse(where, f"makes all lengths of the schema more than {MOST_LENGTH} together", remedy)

    def _require_ends(self) -> None:
        """Refuse a schema that comes back to itself, by references, before it has said anything."""
        here = {
            name: [id(self._resolved(schema["$ref"])) for _ in schema.keys() & {"$ref"}]
            + [id(one) for word in ALSO & schema.keys() for one in schema[word]]
            for name, schema in self.schemas.items()
        }  # fmt: skip
        into = Counter(inner for found in here.values() for inner in found)
        ends = [name for name in here if not into[name]]
        for name in ends:  # grows: a schema is done when all that lead to it are
            for inner in here.get(name, ()):
                into[inner] -= 1
                ends += [inner] * (inner in here and not into[inner])
        if len(ends) < len(here):
            refuse(self.where, "describes a value by itself alone", "leave the reference out")

    def _resolved(self, pointer: Any) -> dict[str, Any]:
        """Return the schema within this one that a reference names."""
        found: Any = self.root
        path = pointer.split("/") if isinstance(pointer, str) else [""]
        for step in path[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        if path[0] != "#" or id(found) not in self.schemas:
            refuse(self.where, f"refers to {str(pointer)[:100]!r}, which is no schema within it", "use '#/$defs/NAME'")
        return found  # type: ignore[no-any-return]


def _require_together(schema: dict[str, Any], where: str) -> None:
    """Refuse keywords that contradict each other, or that cannot be enforced together."""
    for low, high in PAIRS:
        if low in schema and high in schema and schema[low] > schema[high]:
            refuse(f"{where}.{low}", f"is over {high!r}", "send less")
    if "format" in schema and LENGTHS & schema.keys():
        refuse(f"{where}.format", "cannot be enforced together with a length", "leave one out")


def _require_plain(word: str, value: Any, where: str) -> None:
    """Check a keyword that costs nothing."""
    if word in NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MOST_NUMBER:
            refuse(where, f"is no number up to {MOST_NUMBER:g}", "leave it out")
    elif word == "format":
        if not isinstance(value, str) or value not in FORMATS:
            refuse(where, "is a format that cannot be enforced here", "say it in the description")
    elif word == "type":
        if not all(isinstance(one, str) and one in TYPES for one in (value if isinstance(value, list) else [value])):
            refuse(where, "is no type of JSON", f"use {', '.join(sorted(TYPES))}")
    elif word == "required":
        if not isinstance(value, list):
            refuse(where, "is no list", "send a list of names")
    elif word not in {"const", "$ref"} | SAID:
        refuse(where, "is a keyword that cannot be compiled here", "leave it out, and say it in the description")


def compiled_if(strict: bool) -> Check:
    """Return the check of a schema that is compiled, or only shown."""
    return grammar if strict else described
