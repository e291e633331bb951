"""The body of a request, held against its type. No error repeats what was in it, nor holds it in a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import islice
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

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

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of a body, with what clients leave out where it can mean one thing alone."""
        return values


B = TypeVar("B", bound=Body)


async def read_body(service: Service, request: Request, type: type[B]) -> B:
    """The body of a request. What was ignored of it is named in ``request.state.ignored``. Raises ApiError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, and its content-type application/json")
    values = type.completed(parsed(await request.body()))
    body = converted(values, type)
    request.state.ignored = ignored(values, type)
    if request.state.ignored and service.settings.strict_params:
        text = "the body has fields that this server does not know: the header x-tsqp-ignored names them"
        raise ApiError(400, text, code="unknown_parameter")
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
    problem = ""
    try:
        return msgspec.convert(values, type, str_keys=True)
    except msgspec.ValidationError as error:
        problem = str(error)
    except (OverflowError, RecursionError):
        pass
    raise _invalid(problem)


def ignored(values: Mapping[str, Any], type: type[msgspec.Struct]) -> tuple[str, ...]:
    """Places of fields that a type does not have, in values that are of it; ``...`` where there are too many to say.

    Names are cleaned, so that a header may have them. null is the same as nothing.
    """
    found = list(islice(_unknown(values, type), _MAX_NAMES + 1))
    return tuple(dict.fromkeys([*found[:_MAX_NAMES], *(["..."] if len(found) > _MAX_NAMES else [])]))


def _invalid(problem: str) -> ApiError:
    """What msgspec found, without what it repeats of the values."""
    within, missing, expected = _PLACE.search(problem), _MISSING.match(problem), _EXPECTED.match(problem)
    names = (within and within[1].replace("[...]", ""), missing and missing[1])
    param = ".".join(name for name in names if name) or None
    if missing is not None:
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    what = f"must be {expected[1]}, not {expected[2]}" if expected is not None else "has a value that is not allowed"
    return ApiError(400, f"{param or 'the body'} {what}", param=param, code="invalid_type")


def _unknown(values: Mapping[str, Any], type_: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Places of fields that the type does not have, in objects and lists of objects within it too."""
    within = _objects_within(type_)
    others = {*getattr(type_, "refused", ()), type_.__struct_config__.tag_field}
    for name, value in values.items():
        if name in within:
            for place, one in _objects(value) if within[name] else ():
                yield from _unknown(one, _kind_of(one, within[name]), f"{prefix}{name}{place}.")
        elif value is not None and name not in others:
            yield prefix + _clean(name)


@cache
def _objects_within(type_: type[msgspec.Struct]) -> Mapping[str, tuple[type[msgspec.Struct], ...]]:
    """Each field of a type, and the types of objects in it, or in the list that it is."""
    return {field.encode_name: tuple(_structs(field.type)) for field in msgspec.structs.fields(type_)}


def _structs(type_: Any) -> Iterator[type[msgspec.Struct]]:
    if get_origin(type_) is Annotated:
        type_ = get_args(type_)[0]
    if get_origin(type_) in (UnionType, Union, list):
        for one in get_args(type_):
            yield from _structs(one)
    elif isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        yield type_


def _objects(value: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """An object, or those of a list, each with its place there."""
    if isinstance(value, dict):
        yield "", value
    elif isinstance(value, list):
        yield from ((f"[{index}]", one) for index, one in enumerate(value) if isinstance(one, dict))


def _kind_of(values: Mapping[str, Any], types: tuple[type[msgspec.Struct], ...]) -> type[msgspec.Struct]:
    """Which of the types an object is of: the only one, or the one that it says."""
    configs = ((one, one.__struct_config__) for one in types)
    return next(one for one, config in configs if config.tag_field is None or config.tag == values[config.tag_field])


def _clean(name: str) -> str:
    """A name that may stand in a header."""
    return _UNSAFE.sub("?", name)[:_MAX_NAME] or "?"
