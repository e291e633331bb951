"""A traced text reads as a plain one would, whatever is done to it, and no character of the user's turns own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.filters import FILTERS
from markupsafe import Markup

from tsqp.trusted.text.traced import Traced, TracedMarkup, is_own, join_traced, origin, own_text, traced

# Each character says whose it is, also in the other case, and each side has white space, so that cuts fall everywhere.
SHARP_S = "\N{LATIN SMALL LETTER SHARP S}"  # two characters in upper case
OWN, USER = f"ab<&\n {SHARP_S}", "xy>\t\r"
OWNS = frozenset(OWN + OWN.upper() + OWN.casefold() + "Ss")


@st.composite
def mixed(draw: st.DrawFn, max_size: int = 12) -> Traced:
    """A text of characters of both sides."""
    text = draw(st.text(OWN + USER, max_size=max_size))
    return Traced(text, bytes(character in OWN for character in text))


def check(result: object, expected: object, *, complete: bool = True) -> None:
    """The same value as of a plain string; what is marked as own is own, and the rest is not where ``complete``."""
    if isinstance(expected, list | tuple):
        assert isinstance(result, type(expected))
        assert len(result) == len(expected)
        for one, other in zip(result, expected, strict=True):
            check(one, other, complete=complete)
        return
    assert isinstance(result, str)
    assert isinstance(expected, str)
    assert str.__str__(result) == expected
    marks = origin(result)
    assert len(marks) == len(expected)
    for character, mark in zip(expected, marks, strict=True):
        assert not mark or character in OWNS
        assert mark or character not in OWNS or not complete


METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "sum with a plain text on the right": lambda a, b: a + "xy",
    "sum with a plain text on the left": lambda a, b: "xy" + a,
    "product": lambda a, b: a * 3 + 2 * b,
    "slice": lambda a, b: [a[1:], a[:-1], a[::-1], a[1:9:2], a[-3:]],
    "characters": lambda a, b: [*list(a), a[-1:], *[a[at] for at in range(-len(a), len(a))]],
    "join": lambda a, b: a.join([b, "x", b, a]),
    "join of characters": lambda a, b: a.join(b),
    "strip": lambda a, b: [a.strip(), a.lstrip(), a.rstrip(), a.strip("ax"), a.lstrip("xy "), a.rstrip("b>")],
    "split": lambda a, b: [part for sep in (None, " ", "x", "ab", "\n") for part in a.split(sep)],
    "split a few times": lambda a, b: [part for sep in (None, " ", "x") for part in a.split(sep, 1)],
    "split from the right": lambda a, b: [part for sep in (None, " ", "x") for part in a.rsplit(sep, 1)],
    "lines": lambda a, b: [*a.splitlines(), *a.splitlines(True), *a.splitlines(keepends=True)],
    "partition": lambda a, b: [*a.partition("x"), *a.rpartition(" "), *a.partition("ab")],
    "prefix": lambda a, b: [a.removeprefix("a"), a.removesuffix("x"), a.removeprefix(""), a.removesuffix("")],
    "str": lambda a, b: str(a),
}
INCOMPLETE: dict[str, Callable[[Any, Any], Any]] = {
    "case": lambda a, b: [a.upper(), a.lower(), a.title(), a.capitalize(), a.swapcase(), a.casefold()],
    "replace": lambda a, b: [a.replace("x", "a"), a.replace("a", b), a.replace("ab", "b", 1), a.replace("", "a")],
    "format": lambda a, b: [a.replace("%", "") % (), f"{a}", f"{a!s:>9}", a.center(9), a.zfill(9), a.ljust(20)],
    "the other's methods": lambda a, b: ["xy".join([a, b]), "x y".replace("x", a), a.expandtabs(), a.translate({})],
}


@pytest.mark.parametrize("name", METHODS)
@given(a=mixed(), b=mixed())
def test_the_origin_is_kept(name: str, a: Traced, b: Traced) -> None:
    operation = METHODS[name]
    check(operation(a, b), operation(str.__str__(a), str.__str__(b)))


@pytest.mark.parametrize("name", INCOMPLETE)
@given(a=mixed(), b=mixed())
def test_the_origin_is_kept_or_forgotten_but_never_made_up(name: str, a: Traced, b: Traced) -> None:
    operation = INCOMPLETE[name]
    check(operation(a, b), operation(str.__str__(a), str.__str__(b)), complete=False)


def test_what_replaces_the_users_text_is_the_users() -> None:
    text = own_text("a") + "x" + own_text("b")
    assert isinstance(text, Traced)
    assert origin(text.replace("x", own_text("ab"))) == b"\1\0\0\1"
    assert origin(text.replace("a", own_text("bb"))) == b"\1\1\0\1"
    assert origin(text.replace("a", "xx")) == b"\0\0\0\1"
    assert origin(text.replace("ax", own_text("b"))) == b"\0\1"


@given(mixed(), mixed())
def test_case_is_kept_where_no_character_becomes_two(a: Traced, b: Traced) -> None:
    text = str.__str__(a).replace(SHARP_S, "a")
    a = Traced(text, origin(a))
    check([a.upper(), a.lower()], [text.upper(), text.lower()])


@given(mixed(), mixed())
def test_what_is_put_into_an_own_pattern_keeps_its_origin(a: Traced, b: Traced) -> None:
    check(own_text("a%sb%s") % (a, b), f"a{a!s}b{b!s}")
    check(own_text("%s") % a, str(a))
    check(own_text("a%5sb%s") % (a, b), f"a{a!s:>5}b{b!s}", complete=False)
    check(a.replace("%", "") + own_text("%s") % b, f"{a!s}{b!s}")
    assert origin(own_text("%%%s") % "%") == b"\1\0"
    assert origin(Traced("a%s", b"\0\1\1") % own_text("b")) == b"\0\0"


@given(a=mixed(), b=mixed())
def test_markup_escapes_as_it_does_and_keeps_the_origin(a: Traced, b: Traced) -> None:
    plain_a, plain_b = str.__str__(a), str.__str__(b)
    letters = {"l", "t", "g", "m", "p", ";", "&", "a"}  # of the names that escaping writes
    for result, expected in (
        (TracedMarkup(a) + b, Markup(plain_a) + plain_b),
        (a + TracedMarkup(b), plain_a + Markup(plain_b)),
        (TracedMarkup(a) + TracedMarkup(b), Markup(plain_a) + Markup(plain_b)),
    ):
        assert str(result) == str(expected)
        assert isinstance(result, Markup)
        for character, mark in zip(str(expected), origin(result), strict=True):
            assert not mark or character in OWNS | letters
    assert sum(origin(TracedMarkup(a) + TracedMarkup(b))) == sum(origin(a)) + sum(origin(b))
    assert origin(TracedMarkup(a).strip()) == bytes(len(plain_a.strip()))  # forgotten: the user's


def test_other_things_are_the_users() -> None:
    assert origin("abc") == bytes(3)
    assert origin(join_traced([own_text("a"), 7, None, "x"])) == b"\1" + bytes(6)
    assert not is_own("a")
    assert not is_own("")
    assert not is_own(7)
    assert is_own(own_text("a"))
    assert type(traced(7)) is str
    with pytest.raises(TypeError):
        own_text("a") + 7
    with pytest.raises(TypeError):
        own_text("a").join([7])  # type: ignore[list-item]


@given(mixed())
def test_it_is_a_str_to_everybody_else(a: Traced) -> None:
    plain = str.__str__(a)
    assert (a == plain, hash(a) == hash(plain), {str(a): 1}[plain], repr(a) == repr(plain)) == (True, True, 1, True)
    assert FILTERS["upper"](a) == plain.upper()
    assert isinstance(a, str)
