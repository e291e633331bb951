"""Schemas of clients, with objects that end: one that lists its properties gets no others, unless it says so.

Libraries write schemas without ``additionalProperties``, which allows any others. A model that is held to such a schema
token by token may go on with properties that nobody asked for until its bound; not held, it would have ended. What fits
the closed schema fits the client's (tests/server/test_closed_schema.py).
"""

from __future__ import annotations

from typing import Any

# What an object may say without others having a say in what its properties are.
_DEFINITIONS = ("$defs", "definitions")
_NOTES = ("title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment")
_ALONE = frozenset(("type", "properties", "required", *_DEFINITIONS, *_NOTES))
_REFERENCE = frozenset(("$ref", *_DEFINITIONS, *_NOTES))
_TOGETHER = frozenset(("allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "patternProperties"))
_CHOICES = frozenset(("anyOf", "oneOf"))
_MAX_DEPTH = 128


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself where parts of it hold together for one value: closed each, they might exclude each other."""
    return schema if _holds_together(schema, 0) else _closed(schema)


def _holds_together(schema: Any, depth: int) -> bool:
    """Whether a value may have to fit several parts, or none but one of them; also what is no schema."""
    if isinstance(schema, bool):
        return False
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return True
    keys = schema.keys()
    if keys & _TOGETHER or ("$ref" in keys and not keys <= _REFERENCE):
        return True
    if (keys & _CHOICES and "properties" in keys) or ("oneOf" in keys and "discriminator" not in keys):
        return True
    return any(_holds_together(part, depth + 1) for part in _parts(schema))


def _parts(schema: dict[str, Any]) -> list[Any]:
    """The schemas in a schema, of those that ``_closed`` goes into."""
    parts = [schema["items"]] if "items" in schema else []
    for name in ("properties", *_DEFINITIONS):
        parts += schema[name].values() if isinstance(schema.get(name), dict) else []
    for name in ("prefixItems", *_CHOICES):
        parts += schema[name] if isinstance(schema.get(name), list) else []
    return parts


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in made.keys() & {"properties", *_DEFINITIONS}:
        if isinstance(made[name], dict):
            made[name] = {key: _closed(part) for key, part in made[name].items()}
    for name in made.keys() & {"prefixItems", *_CHOICES}:
        if isinstance(made[name], list):
            made[name] = [_closed(part) for part in made[name]]
    if "items" in made:
        made["items"] = _closed(made["items"])
    if isinstance(made.get("properties"), dict) and made.keys() <= _ALONE and _are_listed(made):
        made["additionalProperties"] = False
    return made


def _are_listed(schema: dict[str, Any]) -> bool:
    """Whether all that is required is among the properties."""
    required = schema.get("required", [])
    return isinstance(required, list) and all(isinstance(one, str) and one in schema["properties"] for one in required)
