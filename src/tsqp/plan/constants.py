"""What is measured, and everything else is computed from: ``docs/scaling.md`` §2. Seconds, unless a name says more."""

from __future__ import annotations

from collections.abc import Container
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from tsqp.errors import OptionError

PrivateMode = Literal["masked", "verified"]
TransportKind = Literal["shm", "tcp"]
CallKind = Literal["step", "shm", "tcp", "team_shm", "team_tcp"]
Seconds = Annotated[float, Meta(ge=0.0, lt=1e3)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class ProductTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Products of a device as it was measured. A product of R rows with K·N weights takes ``call_s`` and ``seconds``.

    ``call_s``: what a product takes however small it is, beside what ``Trusted.call_s`` has. ``weight_s``: to read one
    weight. ``few_s``, ``many_s``: one weight times one row, of at most and of more than 16 rows. ``number_s``: one of
    the K + N numbers of a row, of more than 16 rows; what fewer rows take of that is in ``few_s``.
    """

    call_s: Seconds
    weight_s: Seconds
    few_s: Seconds
    many_s: Seconds
    number_s: Seconds = 0.0

    def seconds(self, weights: float, rows: float, numbers: float) -> float:
        """Of a product of ``rows`` rows of ``numbers`` numbers, in and out, with ``weights``; without ``call_s``."""
        few = weights * (self.weight_s + self.few_s * min(rows, FEW_ROWS))
        if rows <= FEW_ROWS:
            return few
        return max(few, weights * (self.weight_s + self.many_s * rows) + numbers * rows * self.number_s)


class NumberTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the trusted side needs for one number of x or y, all its passes together: core-seconds.

    ``few`` in a step of at most 16 rows, ``many`` in a prefill. Seconds, which no second core makes shorter: ``row``,
    for each row of a call of a prefill, however few numbers it has, since slices of rows are handed out in Python;
    ``once``, for a number of a call of few rows, however many they are: vectors and scales come from memory.
    """

    few: Seconds
    many: Seconds
    row: Seconds = 0.0
    once: Seconds = 0.0


class Trusted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trusted side. Core-seconds, but for what a call takes, which no second core makes shorter.

    ``call_s``: a call whose numbers are next to none, both sides and the line together: ``step`` in the compiled step
    over shm, ``shm`` and ``tcp`` in Python, ``team_shm`` and ``team_tcp`` to one worker of a team. ``further_call_s``:
    the same call to one worker more. ``byte_s``: a byte copied and enciphered on its way over tcp, at both ends;
    ``plain_byte_s``: without keys; ``team_byte_s``: seconds of a byte that a team copies beside that. ``dot_s``: a
    number times a check vector. ``flop_s`` and ``cache_byte_s``: attention of prompts, and the keys and values that a
    decode step reads; ``alone_flop_s``: of prompts where everything runs here, by torch. ``pad_weight_s`` and
    ``pad_number_s``: pads made here, for each weight and for each number of x and y.
    """

    call_s: dict[CallKind, Seconds]
    further_call_s: dict[TransportKind, Seconds]
    number_s: dict[PrivateMode, NumberTimes]
    dot_s: Seconds
    byte_s: Seconds
    plain_byte_s: Seconds
    team_byte_s: Seconds
    flop_s: Seconds
    cache_byte_s: Seconds
    pad_weight_s: Seconds
    pad_number_s: Seconds
    alone_flop_s: Seconds
    alone: ProductTimes  # by 8-bit weights, where all runs here; with norms. Seconds on ``Constants.cores`` cores


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker's. ``cores``: of a processor, None of a GPU. ``memory``: bytes, None where any may be had.

    ``source``: where its figures come from, for a person.
    """

    source: str
    cores: Count | None
    memory: Annotated[int, Meta(ge=1)] | None
    products: dict[PrivateMode, ProductTimes]


class Constants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of them. ``cores``: of the machine that the trusted side was measured on."""

    benchmark: Literal["constants"]
    cores: Count
    trusted: Trusted
    devices: Annotated[dict[str, Device], Meta(min_length=1)]
    machine: dict[str, Any]


FEW_ROWS = 16  # up to where products and steps of few rows have loops of their own


def load(path: Path | None = None) -> Constants:
    """Those of a file that ``tsqp bench constants`` wrote, or those that came with this package.

    Raises OptionError.
    """
    try:
        text = (files("tsqp.plan") / "constants.json").read_bytes() if path is None else path.read_bytes()
    except OSError as error:
        raise OptionError(
            f"--constants {path}: {error.strerror}; give a file that tsqp bench constants --results wrote"
        ) from None
    try:
        found = msgspec.json.decode(text, type=Constants)
        _check_whole(found)
    except msgspec.MsgspecError as error:
        raise OptionError(f"--constants: {path} is not what tsqp bench constants writes: {error}") from None
    return found


def _check_whole(found: Constants) -> None:
    """Raises ValidationError where a key is missing that a plan may look up: the types allow any of them to be."""
    trusted = found.trusted
    modes, links = get_args(PrivateMode), get_args(TransportKind)
    tables: list[tuple[str, Container[str], tuple[str, ...]]] = [
        ("trusted.call_s", trusted.call_s, get_args(CallKind)),
        ("trusted.further_call_s", trusted.further_call_s, links),
        ("trusted.number_s", trusted.number_s, modes),
    ]
    tables += [(f"devices.{name}.products", device.products, modes) for name, device in found.devices.items()]
    for name, table, needed in tables:
        missing = [key for key in needed if key not in table]
        if missing:
            raise msgspec.ValidationError(f"{name} has no {', '.join(missing)}")
