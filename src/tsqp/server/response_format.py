"""The form of an answer, as clients say it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from tsqp.errors import OptionError
from tsqp.server.closed_schema import closed
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
    """None for free text. Objects of the schema end, see ``closed``. Raises ApiError, OptionError for no schema."""
    match kind:
        case "text":
            return None
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case _:
            if schema is None:
                raise ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
            return StructuredOutputsParams(json=closed(schema))


@contextmanager
def form_errors(param: str, *, both: bool = False) -> Iterator[None]:
    """Names the field of the API where a form is refused: ``param``, or the tools whose calls are a form.

    ``both``: an answer has that form or is a call. They are read as one, so which of them is wrong is not known.

    Of the reason only words of the list below are told. The library repeats names and values of a schema, and they are
    the client's text.
    """
    problem: OptionError | None = None
    try:
        yield
    except OptionError as error:
        if not any(name.startswith("structured_outputs.") for name in error.fields):
            raise
        problem = error
    if problem is not None:
        of_calls = "structured_outputs.grammar" in problem.fields
        name = param if not of_calls else f"{param} or tools" if both else "tools"
        said, used, reason = str(problem).partition(" cannot be used: ")
        text = f"{name}{used}{_known(reason)}" if used else f"{name} {said.partition(' ')[2]}"
        raise ApiError(400, text, param=param if both else name, code="invalid_schema")


def _known(reason: str) -> str:
    return re.sub(r"\w+", lambda word: word[0] if word[0].lower() in _WORDS else "…", reason)


# Of the library's reasons, then of JSON schemas.
_VOCABULARY = """
a ahead an and any are around array at be behind but by can cannot class closed contains deep deeply does duplicate
empty end error escape exceeds exist expected expression failed form format found greater group has have in including
incompatible invalid is it items key keys keyword large length less limit look many match missing more must name nested
no non not nothing number object of one only or out parse parser parsing pattern pointer properties property range
reached recursion reference regex repetition required schema size string supported syntax text than that the this to
too type types unclosed unexpected unicode unimplemented unknown unrecognized unresolved unsatisfiable unsupported value
values with

additionalItems additionalProperties allOf anchor anyOf boolean const contentEncoding contentMediaType definitions defs
dependencies dependentRequired dependentSchemas dynamicRef else enum exclusiveMaximum exclusiveMinimum id if integer
maxContains maxItems maxLength maxProperties maximum minContains minItems minLength minProperties minimum multiple
multipleOf null oneOf patternProperties prefixItems propertyNames ref then unevaluatedItems unevaluatedProperties
uniqueItems
"""
_WORDS = frozenset(_VOCABULARY.lower().split())
