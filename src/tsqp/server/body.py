"""The body of a request, held against its type. No error repeats what was in it, nor holds it in a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, ClassVar, TypeVar, get_args

import msgspec
from starlette.requests import Request

from tsqp.server.errors import ApiError
from tsqp.server.service import Service

_EXPECTED = re.compile(r"Expected `([^`]*)`, got `(\w+)`")  # of what kind it is: nothing of a value
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_MAX_NAMES = 20
_MAX_NAME = 64
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)


class Body(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=False):
    """A body. ``refused``: fields of the API that are not honoured here, and what may stand in them all the same."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}


B = TypeVar("B", bound=Body)
S = TypeVar("S", bound=msgspec.Struct)


async def read_body(service: Service, request: Request, type: type[B]) -> B:
    """The body of a request. What was ignored of it is named in ``request.state.ignored``. Raises ApiError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, and its content-type application/json")
    values = parsed(await request.body())
    body = converted(values, type)
    unknown = [_clean(name) for name in islice(_unknown(values, type), _MAX_NAMES)]
    if unknown and service.settings.strict_params:
        raise ApiError(400, "the body has a field that this server does not know", code="unknown_parameter")
    request.state.ignored = tuple(dict.fromkeys(unknown))
    return body


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError, also for NaN and Infinity, which are no JSON."""
    values: object = None
    # Not raised while one of these is handled: the errors of the codec hold the text.
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        values = msgspec.json.decode(body)
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object, in UTF-8 and with finite numbers", code="invalid_json")
    return values


def converted(values: Mapping[str, Any], type: type[B]) -> B:
    """The values as one of a type. Raises ApiError that names the field, and not its value."""
    for name, allowed in type.refused.items():
        value = values.get(name)
        if value is not None and not any(value == one and value.__class__ is one.__class__ for one in allowed):
            raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    return as_type(values, type)


def as_type(values: Mapping[str, Any], type: type[S], place: str = "") -> S:
    """The same for what stands at ``place`` of a body."""
    problem = ""
    try:
        return msgspec.convert(values, type, str_keys=True)
    except msgspec.ValidationError as error:
        problem = str(error)
    except (OverflowError, RecursionError):
        pass
    raise _invalid(problem, place)


def _invalid(problem: str, place: str) -> ApiError:
    """What msgspec found, without what it repeats of the values."""
    within, missing, expected = _PLACE.search(problem), _MISSING.match(problem), _EXPECTED.match(problem)
    names = (place, within and within[1].replace("[...]", ""), missing and missing[1])
    param = ".".join(name for name in names if name) or None
    if missing is not None:
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    what = f"must be {expected[1]}, not {expected[2]}" if expected is not None else "has a value that is not allowed"
    return ApiError(400, f"{param or 'the body'} {what}", param=param, code="invalid_type")


def _unknown(values: Mapping[str, Any], type_: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Names of fields that the type does not have, also in objects within."""
    types = {field.encode_name: field.type for field in msgspec.structs.fields(type_)}
    refused = getattr(type_, "refused", {})
    for name, value in values.items():
        if name in types and isinstance(value, dict):
            for inner in (types[name], *get_args(types[name])):
                if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                    yield from _unknown(value, inner, f"{prefix}{name}.")
        elif name not in types and name not in refused:
            yield prefix + name


def _clean(name: str) -> str:
    """A name that may stand in a header."""
    return _UNSAFE.sub("?", name)[:_MAX_NAME] or "?"
