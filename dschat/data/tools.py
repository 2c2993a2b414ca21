"""Tools of a conversation, and the calls of them, in the one form that chat templates read."""

import json
from dataclasses import replace
from typing import Any

from dschat.data.cells import BadRow, Row, describe, is_blank
from dschat.data.comparisons import Comparison, Turn, parse_dialogue

COLUMNS = ("tools", "functions")
"""Where a row says what tools its conversation may call."""


def with_tools(comparison: Comparison, row: Row) -> Comparison:
    """The comparison with the row's tools, if it has any, as the first turn of its prompt.

    Raises `BadRow` for tools that are no list of function schemas.
    """
    tools = tools_of(row)
    if not tools:
        return comparison
    prompt = comparison.prompt
    if isinstance(prompt, str):
        prompt = parse_dialogue(prompt) or (Turn("user", prompt.strip()),)
    return replace(comparison, prompt=(Turn("tools", json.dumps(tools, ensure_ascii=False)), *prompt))


def tools_of(row: Row) -> list[dict]:
    """The function schemas in the row, each as {"type": "function", "function": {"name", ...}}."""
    for column in COLUMNS:
        name = f'"{column}"'
        value = from_json(row.get(column))
        if not is_blank(value):
            some = value if isinstance(value, list) else [value]
            return [_as_function(from_json(tool), name) for tool in some]
    return []


def calls_of(value: Any, name: str) -> list[dict]:
    """The calls that a message makes, their arguments as objects. `name` is what messages call `value`."""
    value = from_json(value)
    if is_blank(value):
        return []
    return [_call(from_json(call), name) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, name: str) -> dict:
    call = _as_function(call, name)
    function = dict(call["function"])
    arguments = from_json(function.get("arguments", function.pop("parameters", None)))
    function["arguments"] = {} if is_blank(arguments) else arguments
    return {**call, "function": function}


def _as_function(value: Any, name: str) -> dict:
    if isinstance(value, dict):
        value = without_nulls(value)
        if isinstance(value.get("function"), dict) and isinstance(value["function"].get("name"), str):
            return {"type": "function", **value}
        if isinstance(value.get("name"), str):
            kept = {key: value.pop(key) for key in ("id",) if key in value}
            value.pop("type", None)
            return {"type": "function", **kept, "function": value}
        if value.get("type") not in (None, "function"):  # a tool that is no function, such as a search
            return value
    raise BadRow(f'{name} must be a list of objects with a "name", but holds {describe(value)}')


def from_json(value: Any) -> Any:
    """The decoded value of a string of JSON; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "[", '"', "n"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def without_nulls(value: Any) -> Any:
    """The value without nulls in objects: Arrow gives every object the keys that any other one has."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value
