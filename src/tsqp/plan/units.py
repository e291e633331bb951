"""Rates and times as people write them; these and sizes for people to read."""

from __future__ import annotations

import re

from tsqp.errors import OptionError

_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_TIMES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_SIZE_NAMES, _RATE_NAMES = ("B", "kB", "MB", "GB", "TB"), ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s")


def parse_rate(text: str, option: str) -> float:
    """Bytes a second of ``100Gbit``. Raises OptionError, which names the option."""
    return _parse(text.removesuffix("/s"), _RATES, f"{option} is a rate such as 100Gbit") / 8


def parse_seconds(text: str, option: str) -> float:
    """Seconds of ``0.1ms``. Raises OptionError, which names the option."""
    return _parse(text, _TIMES, f"{option} is a time such as 0.1ms")


def _parse(text: str, units: dict[str, float], meant: str) -> float:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?) ?([A-Za-zµ]{1,4})", text.strip())
    if found is None or found[2].lower() not in units:
        raise OptionError(f"{meant}, and not {text[:40]!a}")
    return float(found[1]) * units[found[2].lower()]


def counted(number: int, one: str, more: str | None = None) -> str:
    """``1 worker``, ``2 workers``. ``more`` where that is not ``one`` with an s."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def size_text(count: float) -> str:
    """``1.5 GB``."""
    return _text(count, _SIZE_NAMES)


def rate_text(bytes_per_s: float) -> str:
    """``10 Gbit/s``."""
    return _text(bytes_per_s * 8, _RATE_NAMES)


def seconds_text(seconds: float) -> str:
    """``12.3 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _text(value: float, names: tuple[str, ...]) -> str:
    for name in names[:-1]:
        if value < 999.5:
            return f"{value:.3g} {name}"
        value /= 1000
    return f"{value:.3g} {names[-1]}"
