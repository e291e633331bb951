"""From the fields of a configuration to flags and variables, and back from the fields that an error names.

A field's flag is its name with hyphens, except for those in ``NAMES``; its variable is ``TSQP_`` and the same name. A
field without help has no flag and keeps its default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from cyclopts import Parameter, Token

from tsqp.api.config import RunConfig
from tsqp.cli.help_groups import CONNECTION, MODEL, PADS, PRIVACY, SAMPLING
from tsqp.config.worker_options import device_name
from tsqp.errors import OptionError, TsqpError

T = TypeVar("T", bound="DataclassInstance")

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NAMES = {
    "address": "--worker",
    "arena_bytes": "--arena",
    "compiled": "--compile",
    "deadline_s": "--deadline",
    "json": "--json-schema",
    "patience_s": "--worker-patience",
    "server_key": "--worker-key",
    "stop_token_ids": "--stop-token",
    "user": "--worker-user",
}
SHORT = {"model": "-m", "max_tokens": "-n"}
HEADINGS = {"model": MODEL, "privacy": PRIVACY, "pads": PADS, "connection": CONNECTION, "sampling": SAMPLING}

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,12})?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def flags_of(config: type[T], **defaults: object) -> type[T]:
    """The same configuration as a class that cyclopts makes flags of, with other ``defaults`` where given."""
    made: list[tuple[str, Any, Any]] = []
    for one in fields(config):
        if is_dataclass(one.default):
            section: Any = flags_of(type(one.default))
            made.append((one.name, section, field(default=section())))
        else:
            default = defaults.get(one.name, one.default)
            made.append((one.name, _annotated(config, one), field(default=default, hash=one.hash)))
    derived = make_dataclass(config.__name__, made, bases=(config,), frozen=True)
    derived.__module__ = config.__module__  # not one of the standard library, whose classes are values to cyclopts
    return Parameter(name="*")(derived)


def flag_of(name: str) -> str:
    """The flag of a field, which may have its section before it: ``guard.pad_memory``."""
    last = name.rpartition(".")[2]
    off = "no-" if last in ("compiled_kernels", "compiled_step") else ""  # on unless turned off
    return NAMES.get(last, f"--{off}{last.replace('_', '-')}")


def explained(error: TsqpError) -> str:
    """The text of an error, with flags for the options that it names."""
    return error.explained(flag_of)


def parse_size(text: str, name: str) -> int:
    """Bytes of ``512MB``, ``2G``, ``1GiB`` or a plain number. Raises OptionError, with the ``name`` of the option."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"{name} '{text[:40]}' is no size: use bytes, or a number with MB, GB, MiB or GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def size(_: Any, tokens: Sequence[Token]) -> int:
    """See parse_size; for cyclopts, which knows the option."""
    return parse_size(tokens[0].value, tokens[0].keyword or "the size")


def shown_size(count: int) -> str:
    """A default in the help."""
    return f"{count >> 20}MiB"


def _parameter(one: Field[Any]) -> Parameter:
    """How cyclopts reads one field."""
    about = one.metadata
    if "help" not in about:
        return Parameter(parse=False)
    flag = NAMES.get(one.name, f"--{one.name.replace('_', '-')}")
    variables = [f"TSQP_{flag[2:].upper().replace('-', '_')}"] if about.get("variable") else []
    variables += [about["former"]] if about.get("former") else []
    more: dict[str, Any] = {}
    if about.get("size"):
        more = {"converter": size, "show_default": shown_size if one.default else None}
    elif one.name == "device":
        more = {"converter": _device}
    elif one.default is True or one.name == "oblivious":  # on where nothing is said, at least in some places
        more = {"negative": f"--no-{flag[2:]}"}
    return Parameter(
        name=[flag, *([SHORT[one.name]] if one.name in SHORT else [])],
        env_var=variables or None,
        group=HEADINGS[about["heading"]],
        help=about["help"],
        **more,
    )


def _device(_: Any, tokens: Sequence[Token]) -> str:
    return device_name(tokens[0].value)


def option_type(section: str, name: str) -> Any:
    """One field of ``RunConfig`` or of one of its sections, as the type of a command's own parameter."""
    config = RunConfig if not section else type(getattr(RunConfig(), section))
    (one,) = (one for one in fields(config) if one.name == name)
    return _annotated(config, one)


def _annotated(config: type[DataclassInstance], one: Field[Any]) -> Any:
    """The type of a field, with how cyclopts reads the field."""
    hint = get_type_hints(config)[one.name]
    if one.name == "address":
        hint = tuple[str, ...] | None  # a flag that may be given again, a variable with spaces
    return Annotated[hint, _parameter(one)]
