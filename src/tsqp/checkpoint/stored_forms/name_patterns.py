"""Patterns for names of modules in a configuration: those that are matched in bounded time.

Covers: a stranger's regular expression takes a fraction of a second for a name, or is refused before it is used
(tests/checkpoint/stored_forms/test_name_patterns.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from math import inf, prod
from typing import Any

from tsqp.checkpoint.config_bounds import shown
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

MAX_WAYS = 20_000_000
_LENGTH = 40  # of a name, about: in how many ways a quantifier without a bound can take a part of it
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")

_parser: Any = import_module("re._parser")  # Python's own: what it matches is what is looked at


def check_pattern(pattern: str, where: str) -> None:
    """Raises CorruptCheckpoint for what is no pattern, UnsupportedModel for one that can take too long."""
    try:
        found = ways(pattern)
        if found <= MAX_WAYS:
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CorruptCheckpoint(f"{where}: {shown(pattern)} is no pattern: {error}") from error
    if found > MAX_WAYS:
        raise UnsupportedModel(f"{where}: the pattern {shown(pattern)} can take too long to match")


def ways(pattern: str) -> float:
    """In how many ways a pattern may be tried on a name, at most; infinitely many for what is not bounded here.

    Quantifiers and alternatives multiply. Over a group with a choice of its own, a quantifier makes the ways grow
    exponentially with the name.
    """
    return _of_all(_parser.parse(pattern))


def _of_all(items: Iterable[tuple[Any, Any]]) -> float:
    return prod((_of(str(kind), value) for kind, value in items), start=1.0)


def _of(kind: str, value: Any) -> float:
    if kind in _REPEATS:
        return _of_repeat(*value)
    match kind:
        case "BRANCH":
            return sum(_of_all(branch) for branch in value[1])
        case "SUBPATTERN":
            return _of_all(value[-1])
        case "ASSERT" | "ASSERT_NOT":
            return _of_all(value[1])
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT" | "GROUPREF":
            return 1
    return inf


def _of_repeat(least: int, most: int, body: Any) -> float:
    inside = _of_all(body)
    if most <= 1:
        return inside + (1 - least)
    if inside > 1 or least > _LENGTH or _has_repeat(body):
        return inf
    return min(most - least + 1, _LENGTH)


def _has_repeat(items: Iterable[tuple[Any, Any]]) -> bool:
    """Whether there is a quantifier in it, also one of a fixed number: those multiply as well."""
    return any(str(kind) in _REPEATS or (str(kind) == "SUBPATTERN" and _has_repeat(value[-1])) for kind, value in items)
