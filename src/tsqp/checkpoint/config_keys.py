"""Typed access to the keys of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsqp.checkpoint.config_bounds import MAX_NUMBER, MAX_SIZE, MIN_NUMBER, shown
from tsqp.errors import CorruptCheckpoint


class Keys:
    """Typed access to a JSON object: every error names the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer of 31 bits; required when there is no default. A default also replaces null."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CorruptCheckpoint(f"{self._where} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CorruptCheckpoint(f"{self._where}: {key} must be a positive integer, not {shown(value)}")
        if value > MAX_SIZE:
            raise CorruptCheckpoint(f"{self._where}: {key} must be at most {MAX_SIZE}, not {shown(value)}")
        return value

    def optional_size(self, key: str, default: int | None) -> int | None:
        """A positive integer or null; the default only replaces an absent key."""
        if key in self._values:
            return None if self._values[key] is None else self.size(key)
        return default

    def number(self, key: str, default: float | None = None) -> float:
        """A number from 1e-30 to 1e30; required when there is no default."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CorruptCheckpoint(f"{self._where} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CorruptCheckpoint(f"{self._where}: {key} must be a positive number, not {shown(value)}")
        if not MIN_NUMBER <= value <= MAX_NUMBER:
            raise CorruptCheckpoint(f"{self._where}: {key} must be from 1e-30 to 1e30, not {shown(value)}")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """A number from 1e-30 to 1e30, or null; the default only replaces an absent key."""
        if key in self._values:
            return None if self._values[key] is None else self.number(key)
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise CorruptCheckpoint(f"{self._where}: {key} must be true or false, not {shown(value)}")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers from 1e-30 to 1e30."""
        values = self._values.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise CorruptCheckpoint(f"{self._where}: {key} must list {count} numbers")
        return tuple(Keys({key: value}, self._where).number(key) for value in values)
