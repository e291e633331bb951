"""A text that knows, character by character, what the chat template wrote itself.

Covers: which characters of a rendered conversation may form a control token (tests/trusted/text/test_traced.py).
Does not cover: what a template decides after it has read a message; the words it writes then are still its own.
Assumes: only the template's own literals and the checkpoint's special tokens become ``own``.

Trust is proven, never assumed. A character is the template's own only while every step that moved it kept the proof; an
operation that this module does not know gives a plain ``str``, and a plain ``str`` counts as the user's. So a gap in
this module costs a control token of the template, and can never give one to the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

from markupsafe import Markup, escape

_OWN, _USER = b"\x01", b"\x00"


class Traced(str):
    """A ``str`` in every respect; ``_own`` has one byte a character: 1 for the template's own, 0 for the user's.

    Methods that are not here are those of ``str``: they give plain strings, which are the user's.
    """

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, text: str = "", own: bytes | None = None) -> Traced:
        made = super().__new__(cls, text)
        made._own = origin(text) if own is None else own
        return made

    def __str__(self) -> str:
        return self  # str(x) in a filter keeps the proof

    def __add__(self, other: Any) -> str:
        return _sum(self, other) if _joins(other) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return _sum(other, self) if _joins(other) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        return Traced(str.__mul__(self, count), self._own * int(count))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        text = str.__mod__(self, values)
        if not is_own(self):
            return text
        known = join_traced(self._formatted(iter(values if isinstance(values, tuple) else (values,))))
        return known if known == text else text  # a pattern with other fields than %s: the text counts as the user's

    def _formatted(self, values: Iterator[object]) -> Iterator[object]:
        for part in self._laid_end_to_end(re.split("(%[s%])", str.__str__(self))):
            if part == "%s":
                yield next(values, "")
            else:
                yield own_text("%") if part == "%%" else part

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        part = self._own[key]
        return Traced(str.__getitem__(self, key), bytes([part]) if isinstance(part, int) else part)

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))

    def join(self, parts: Iterable[str], /) -> str:
        listed = list(parts)
        text = str.join(self, listed)
        return Traced(text, self._own.join(origin(part) for part in listed))

    def upper(self) -> str:
        return self._same_length(str.upper(self))

    def lower(self) -> str:
        return self._same_length(str.lower(self))

    def title(self) -> str:
        return self._same_length(str.title(self))

    def capitalize(self) -> str:
        return self._same_length(str.capitalize(self))

    def _same_length(self, text: str) -> str:
        # One character never becomes fewer than one, so at the same length each stands where it stood.
        return Traced(text, self._own) if len(text) == len(self) else text

    def strip(self, chars: str | None = None, /) -> str:
        return _lstrip(_rstrip(self, chars), chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return _lstrip(self, chars)

    def rstrip(self, chars: str | None = None, /) -> str:
        return _rstrip(self, chars)

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found_in_order(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found_in_order(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = str.splitlines(self, keepends)
        whole = self._laid_end_to_end(str.splitlines(self, keepends=True))
        return [line[: len(text)] for line, text in zip(whole, lines, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._laid_end_to_end(str.partition(self, sep))
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._laid_end_to_end(str.rpartition(self, sep))
        return before, found, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """What is put in place of user's text is the user's: the user chose that it stands there."""
        text = str.replace(self, old, new, count)
        if not old:
            return text
        pieces = self._found_in_order(str.split(self, old, count), old)
        own, at = origin(pieces[0]), len(pieces[0])
        for piece in pieces[1:]:
            replaced = self._own[at : at + len(old)]
            own += (origin(new) if is_own(Traced(old, replaced)) else _USER * len(new)) + origin(piece)
            at += len(old) + len(piece)
        return Traced(text, own)

    def _laid_end_to_end(self, pieces: Iterable[str]) -> list[str]:
        """Pieces that together are this text."""
        at, found = 0, []
        for piece in pieces:
            found.append(self[at : at + len(piece)])
            at += len(piece)
        return found

    def _found_in_order(self, pieces: list[str], sep: str | None) -> list[str]:
        """Pieces with ``sep`` between them, or with white space (None): then each is the next place it is found at."""
        at, found = 0, []
        for piece in pieces:
            if sep is None:
                at = self.index(piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(sep or "")
        return found


class TracedMarkup(Markup):
    """What the filter ``safe`` makes: it escapes for HTML what is added to it, as in jinja2, and keeps the origin."""

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, text: Any = "", own: bytes | None = None) -> TracedMarkup:
        made = super().__new__(cls, text)
        if own is None:
            own = origin(text) if isinstance(text, str) else b""
        made._own = own  # of another length, it proves nothing
        return made

    def __add__(self, other: Any) -> Any:
        return _safe_sum(Markup.__add__(self, other), self, other)

    def __radd__(self, other: Any) -> Any:
        return _safe_sum(Markup.__radd__(self, other), other, self)


def own_text(text: str) -> Traced:
    """A text that stands in the template, or that the checkpoint gives to it."""
    return Traced(str.__str__(text), _OWN * len(text))


def origin(text: str) -> bytes:
    """One byte a character: 1 for the template's own, 0 for the user's."""
    own = text._own if isinstance(text, Traced | TracedMarkup) else b""
    return own if len(own) == len(text) else _USER * len(text)


def is_own(value: object) -> bool:
    """Whether a value is a text of which every character is the template's own."""
    return isinstance(value, Traced) and _USER not in value._own


def join_traced(parts: Iterable[object]) -> Traced:
    """The text of all parts, one after the other; what is not traced is the user's."""
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    return Traced("".join(texts), b"".join(origin(text) for text in texts))


def traced(value: object) -> str:
    """A value as the text that a template writes for it."""
    return value if isinstance(value, Traced | TracedMarkup) else str(value)


def _joins(other: object) -> bool:
    # Markup escapes what is added to it, in an operator of its own.
    return isinstance(other, str) and not hasattr(other, "__html__")


def _sum(left: str, right: str) -> Traced:
    return Traced(str.__add__(left, right), origin(left) + origin(right))


def _safe_sum(whole: Any, left: Any, right: Any) -> Any:
    """The sum with its origin; NotImplemented stays so."""
    return TracedMarkup(whole, _escaped_origin(left) + _escaped_origin(right)) if isinstance(whole, str) else whole


def _escaped_origin(text: str) -> bytes:
    """The origin of a text after escaping, which writes each character as one or as several."""
    own = origin(text)
    if hasattr(text, "__html__"):
        return own
    return b"".join(own[at : at + 1] * len(escape(character)) for at, character in enumerate(text))


def _lstrip(text: str, chars: str | None) -> str:
    return text[len(text) - len(str.lstrip(text, chars)) :]


def _rstrip(text: str, chars: str | None) -> str:
    return text[: len(str.rstrip(text, chars))]
