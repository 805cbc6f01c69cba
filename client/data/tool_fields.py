"""`tools_of`, `tool_calls_of`: tools and their calls in an example, as SGLang hands them to the chat template.

A tool in a request passes through SGLang's pydantic models, which add keys; a template that prints a tool as JSON would
print them, too. So what is trained has them as well.
"""

import json
from collections.abc import Mapping
from typing import Any

from umbel.errors import DataError
from umbel.wire import repeated_key

FUNCTION = ("name", "description", "parameters", "strict")
"""Keys of a tool's function that a request can carry."""


def once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Return the fields of a JSON object; raise DataError for one that is written twice."""
    twice = repeated_key(pairs)
    if twice is not None:
        name = json.dumps(twice) if len(twice) <= 20 and twice.isprintable() else "a field"
        raise DataError(f"{where}: {name} is written twice in one object; keep one")
    return dict(pairs)


def tools_of(tools: object, where: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of an example: a list of OpenAI's tools, of functions, or such a list as JSON text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools, object_pairs_hook=lambda pairs: once(pairs, where))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f'{where}: "tools" is a text that is not JSON; write a list of tools') from error
    if tools in (None, "", []):
        return ()
    if not isinstance(tools, list):
        raise DataError(f'{where}: "tools" is no list; write [{{"type": "function", "function": {{"name": …}}}}]')
    return tuple(_tool(tool, f"{where}: tools[{index}]") for index, tool in enumerate(tools))


def _tool(tool: object, where: str) -> dict[str, Any]:
    if isinstance(tool, dict) and "function" not in tool:
        tool = {"type": "function", "function": tool}
    if not isinstance(tool, dict) or not isinstance(tool["function"], dict) or tool.get("type") != "function":
        raise DataError(f'{where}: no tool; write {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
    function = {key: value for key, value in tool["function"].items() if value is not None or key in FUNCTION[1:3]}
    unknown = [key for key in (*function, *tool) if key not in (*FUNCTION, "type", "function", "defer_loading")]
    if unknown:
        raise DataError(f'{where}: "{unknown[0]}" cannot be part of a request\'s tool; known: {", ".join(FUNCTION)}')
    if not isinstance(function.get("name"), str):
        raise DataError(f'{where}: its function has no "name"')
    function |= {key: None for key in ("description", "parameters") if key not in function}
    return {"type": "function", "function": function, "defer_loading": None}


def tool_calls_of(calls: object, where: str) -> tuple[dict[str, Any], ...]:
    """Return the calls of an answer, with their arguments as objects."""
    if calls in (None, []):
        return ()
    if not isinstance(calls, list):
        raise DataError(f'{where}: "tool_calls" is no list')
    return tuple(_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls))


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where}: no call; write {{"type": "function", "function": {{"name": …, "arguments": …}}}}')
    unknown = [key for key in (*call, *function) if key not in ("id", "index", "type", "function", "name", "arguments")]
    if unknown:
        raise DataError(f'{where}: "{unknown[0]}" is no known field of a call')
    arguments = _arguments(function, where)
    return {
        "id": call.get("id"),
        "index": call.get("index"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _arguments(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, object_pairs_hook=lambda pairs: once(pairs, where))
        except DataError:
            raise
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise DataError(f'{where}: "arguments" is no JSON object, which is what a template expects')
    return arguments
