"""The form of an answer, as clients say it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tsqp.server.errors import ApiError
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams


class JsonSchema(msgspec.Struct, kw_only=True, frozen=True):
    """``schema``: what the answer is held to, whatever ``strict`` says; ``name`` and ``description`` are for people."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, frozen=True):
    """``json_schema`` is for the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def form_of(kind: str, schema: dict[str, Any] | None, param: str) -> StructuredOutputsParams | None:
    """None for free text. Raises ApiError, and OptionError for a schema that is none."""
    match kind:
        case "text":
            return None
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case _:
            if schema is None:
                raise ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
            return StructuredOutputsParams(json=schema)


def refuse_both(form: StructuredOutputsParams | None, has_tools: bool, param: str) -> None:
    """Raises ApiError: a call and a form of one's own are two forms."""
    if form is not None and has_tools:
        raise ApiError(
            400, f"{param} and tools exclude each other, unless tool_choice is none", param=param, code="invalid_value"
        )
