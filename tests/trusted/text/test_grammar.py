"""Answers of a given form: nothing else comes, they end when they are complete, and a bad form is refused before."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits

from tests.commands import LIMIT_S
from tests.trusted.text.vocabularies import BYTE_LEVEL, VOCABULARIES
from tsqp.errors import InputError, OptionError, UnsupportedModel
from tsqp.trusted.engine.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams
from tsqp.trusted.text.grammar import Grammar, GrammarMatcher, _with_a_large_stack, check_form
from tsqp.trusted.text.tokenizer import Tokenizer

PADDED = 700  # tokens that the model has, more than any of these vocabularies
WITHOUT = ("merges that make a control token", "unigram")  # kinds that the library does not know
KNOWN = sorted(set(VOCABULARIES) - set(WITHOUT))
ENDS = ("</s>", "<|im_end|>")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@cache
def ends(name: str) -> tuple[int, ...]:
    plain = json.loads(VOCABULARIES[name].tokenizer_json)
    return tuple(token["id"] for token in plain["added_tokens"] if token["content"] in ENDS)


@cache
def tokenizer(name: str = BYTE_LEVEL) -> Tokenizer:
    return Tokenizer(replace(VOCABULARIES[name], eos_token_ids=ends(name)))


def grammar(name: str = BYTE_LEVEL, **form: Any) -> Grammar:
    return tokenizer(name).grammar(StructuredOutputsParams(**form), PADDED)


def allowed(matcher: GrammarMatcher) -> set[int]:
    return set(matcher.allowed().nonzero()[0].tolist())


def walk(name: str, matcher: GrammarMatcher, seed: int, most: int = 400) -> list[int]:
    """A text that the grammar allows, each token at random, up to an end token."""
    chance, tokens = random.Random(seed), list[int]()
    while len(tokens) < most:
        choices = sorted(allowed(matcher))
        assert matcher.complete == bool(set(ends(name)) & set(choices)), "an end where the form is complete, only there"
        token = chance.choice(choices)
        matcher.accept(token)
        if token in ends(name):
            return tokens
        tokens.append(token)
    raise AssertionError("no end")


def fits_schema(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and value["age"] in range(151)
        and len(value["tags"]) <= 3
        and all(tag in ("a", "é", 3, None) for tag in value["tags"])
    )


@settings(max_examples=15)
@given(st.sampled_from(KNOWN), st.integers(0, 10_000))
def test_every_text_of_a_schema_is_json_that_fits_without_white_space_between(name: str, seed: int) -> None:
    tokens = walk(name, grammar(name, json=SCHEMA).matcher(), seed)
    text = tokenizer(name).decode(tokens)
    value = json.loads(text)
    assert fits_schema(value)
    assert len(text) <= len(json.dumps(value, separators=(",", ":"), ensure_ascii=True))


FORMS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"regex": r"[a-c]{2,5}-[0-9]{3}é?"}, re.compile(r"[a-c]{2,5}-[0-9]{3}é?").fullmatch),
    ({"choice": ["yes", 'a"b\\', "\n\té\x01", "<|im_start|>"]}, ["yes", 'a"b\\', "\n\té\x01", "<|im_start|>"].count),
    ({"grammar": 'start: "(" start ")" | /[xy]/'}, re.compile(r"\(*[xy]\)*").fullmatch),
    ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
]


@settings(max_examples=40)
@given(st.sampled_from(KNOWN), st.integers(0, 10_000), st.sampled_from(FORMS[:-1]))
def test_every_text_has_the_form(name: str, seed: int, form: tuple[dict[str, Any], Callable[[str], Any]]) -> None:
    asked, has = form
    text = tokenizer(name).decode(walk(name, grammar(name, **asked).matcher(), seed))
    assert has(text), text


def test_a_json_object_is_any_object_and_nothing_else() -> None:
    asked, _ = FORMS[-1]
    matcher = grammar(**asked).matcher()
    for token in tokenizer().encode('{"a":[1,{"b":null}],"c":"\\n é"}'):
        assert token in allowed(matcher)
        assert not matcher.complete
        matcher.accept(token)
    assert allowed(matcher) == set(ends(BYTE_LEVEL))
    (opening,) = allowed(grammar(**asked).matcher())
    assert tokenizer().decode([opening]) == "{"


def test_white_space_between_parts_does_not_come_back_by_an_option_within_the_schema() -> None:
    options = {"whitespace_flexible": True, "whitespace_pattern": "[ ]*", "item_separator": " *, *"}
    matcher = grammar(json={**SCHEMA, "x-guidance": options}).matcher()
    matcher.accept(*tokenizer().encode("{"))
    assert {tokenizer().decode([token]) for token in allowed(matcher)} == {'"'}


@pytest.mark.parametrize("name", KNOWN)
def test_control_tokens_and_tokens_without_a_text_never_come(name: str) -> None:
    """Any character may come here, so any token but those."""
    matcher = grammar(name, regex=r"(?s:.){3,}").matcher()
    (one,) = tokenizer(name).encode("a", special_tokens=False)[-1:]
    control = {token for token in range(PADDED) if tokenizer(name).decode([one, token]) == "a"}
    assert len(control) > PADDED - 400
    assert not allowed(matcher) & control


def test_answers_of_one_grammar_go_on_by_themselves() -> None:
    both = grammar(choice=["ab", "cd"])
    first, second = both.matcher(), both.matcher()
    first.accept(*tokenizer().encode("a"))
    assert {tokenizer().decode([token]) for token in allowed(second)} == {"a", "c"}
    assert {tokenizer().decode([token]) for token in allowed(first)} == {"b"}


def test_a_token_that_is_not_allowed_is_an_error_and_the_answer_cannot_go_on() -> None:
    matcher = grammar(regex="ab").matcher()
    with pytest.raises(InputError, match="does not allow this token"):
        matcher.accept(*tokenizer().encode("b"))
    with pytest.raises(InputError, match="too complex"):
        matcher.allowed()


def test_a_form_that_needs_a_token_which_the_model_has_not_is_an_error() -> None:
    """A tokenizer may know more tokens than the model has rows: the last ones, as Gemma's of images."""
    known = VOCABULARIES[BYTE_LEVEL]
    size = 1 + max(token["id"] for token in json.loads(known.tokenizer_json)["added_tokens"])
    params = StructuredOutputsParams(grammar=f'start: "a" <[{size - 1}]>')
    (first,) = tokenizer().encode("a")
    matcher = tokenizer().grammar(params, size).matcher()
    matcher.accept(first)
    assert allowed(matcher) == {size - 1}
    matcher = tokenizer().grammar(params, size - 1).matcher()
    matcher.accept(first)
    with pytest.raises(InputError, match="a token here that the model has not"):
        matcher.allowed()


def many_properties(count: int) -> dict[str, Any]:
    """None of which has to be there, so that each may be the next one."""
    properties = {f"p{index}": {"type": "integer"} for index in range(count)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


@pytest.mark.parametrize("first", [0, 1099, 2199])
def test_a_schema_may_have_thousands_of_optional_properties(first: int) -> None:
    matcher = grammar(json=many_properties(2200)).matcher()
    for token in tokenizer().encode(f'{{"p{first}":7}}'):
        assert token in allowed(matcher)
        matcher.accept(token)
    assert matcher.complete


def test_a_form_that_becomes_too_complex_says_so_and_not_that_a_token_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.trusted.text.grammar._LIMITS", LLParserLimits(max_items_in_row=100))
    matcher = grammar(json=many_properties(60)).matcher()
    with pytest.raises(InputError, match="became too complex within an answer"):
        matcher.accept(*tokenizer().encode("{"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "frob"}}, "Invalid type: frob"),
    ({"json": {"type": "object", "properties": 5}}, "properties must be an object"),
    ({"json": {"$ref": "https://example.com/x"}}, "not present in a registry"),
    ({"json": {"$ref": "#/nope"}}, "does not exist"),
    ({"json": {"$ref": "#"}}, "no text has this form"),
    ({"json": {"not": {"type": "object"}}}, "Unimplemented keys"),
    ({"json": {"enum": []}}, "Unsatisfiable"),
    ({"json": {"type": "string", "pattern": "(a"}}, "unclosed group"),
    ({"json": '{"a":' * 500 + "1" + "}" * 500}, "recursion limit|nested too deeply"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": "["}, "unclosed character class"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": r"[^\s\S]"}, "no text has this form"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, "nested"),
    ({"grammar": "frob"}, "Expected token"),
    ({"grammar": 'start: "a" nothing'}, "unknown name"),
    ({"grammar": "start: start"}, "no text has this form"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "nested"),
]


@pytest.mark.parametrize(("form", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_form_is_refused_in_one_line_that_names_it(form: dict[str, Any], words: str) -> None:
    (kind,) = form
    with pytest.raises(OptionError, match=words) as refused:
        grammar(**form)
    text = str(refused.value)
    assert text.startswith(f"structured_outputs.{kind} cannot be used: ")
    assert len(text.splitlines()) == 1
    assert len(text) < 250
    assert refused.value.fields == (f"structured_outputs.{kind}",)


@pytest.mark.parametrize(("form", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_form_that_cannot_be_read_is_refused_without_a_tokenizer(form: dict[str, Any], words: str) -> None:
    """In the same words. Whether there is any text of it, only a tokenizer tells."""
    params = StructuredOutputsParams(**form)
    if words == "no text has this form":
        check_form(params)
        return
    with pytest.raises(OptionError, match=words) as refused:
        check_form(params)
    assert str(refused.value).startswith(f"structured_outputs.{params.kind} cannot be used: ")


@pytest.mark.parametrize("form", [{"json": SCHEMA}, *(form for form, _ in FORMS)], ids=lambda form: next(iter(form)))
def test_a_good_form_needs_no_tokenizer_to_be_read(form: dict[str, Any]) -> None:
    check_form(StructuredOutputsParams(**form))


def test_an_error_does_not_repeat_a_form_at_length() -> None:
    for form in ({"regex": "secret" * 1000 + "("}, {"json": {"$ref": "https://" + "secret" * 1000}}):
        with pytest.raises(OptionError) as refused:
            grammar(**form)
        assert str(refused.value).count("secret") < 40


def chain(link: str, last: str, separator: str = "\n") -> str:
    """As many links as a form may have characters, each to the next one."""
    links, size, number = list[str](), len(last) + 8, 0
    while size < MAX_CHARACTERS - 700:
        links.append(link.format(number, number + 1))
        size += len(links[-1]) + len(separator)
        number += 1
    return separator.join([*links, last.format(number)])


DEEP: dict[str, dict[str, str]] = {
    "rules": {"grammar": "start: x0\n" + chain("x{}:x{}", 'x{}:"a"')},
    "terminals": {"grammar": "start: X0\n" + chain('X{}:"a" X{}|"b"', 'X{}:"a"')},
    "references": {
        "json": '{"$ref":"#/$defs/0","$defs":{' + chain('"{}":{{"$ref":"#/$defs/{}"}}', '"{}":{{}}', ",") + "}}"
    },
    "items": {
        "json": '{"$ref":"#/$defs/0","$defs":{'
        + chain('"{}":' + '{{"items":' * 50 + '{{"$ref":"#/$defs/{}"}}' + "}}" * 50, '"{}":{{}}', ",")
        + "}}"
    },
}


@pytest.mark.parametrize("name", DEEP)
def test_a_form_that_refers_from_one_rule_to_the_next_does_not_end_the_process(name: str) -> None:
    """It did, by a stack overflow: llguidance recurses along the chain."""
    (text,) = DEEP[name].values()
    assert 0.9 * MAX_CHARACTERS < len(text) <= MAX_CHARACTERS
    assert allowed(grammar(**DEEP[name]).matcher())


WORDS = st.sampled_from(
    [
        "start",
        ":",
        "|",
        "(",
        ")",
        "*",
        "{",
        "}",
        "[",
        "]",
        '"a"',
        "/b+/",
        "\n",
        "%json",
        "%ignore",
        "~",
        "<",
        ">",
        "x",
        "1",
    ]
)


@settings(max_examples=150)
@given(
    st.one_of(
        st.fixed_dictionaries({"regex": st.text(min_size=1, max_size=30)}),
        st.fixed_dictionaries({"regex": st.text(r"ab()[]{}*+?|\^$.-,0159", min_size=1, max_size=30)}),
        st.fixed_dictionaries({"grammar": st.lists(WORDS, max_size=25).map(lambda words: "start: " + " ".join(words))}),
        st.fixed_dictionaries(
            {
                "json": st.dictionaries(
                    st.sampled_from(["type", "properties", "items", "anyOf", "$ref", "enum", "pattern", "minimum"]),
                    st.recursive(
                        st.sampled_from(["string", "object", "#", 3, -1e300, None, True]),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("type"), inner, max_size=1),
                        max_leaves=5,
                    ),
                    max_size=3,
                )
            }
        ),
    )
)
def test_whatever_is_given_is_read_or_refused(form: dict[str, Any]) -> None:
    said = ""
    try:
        assert allowed(grammar(**form).matcher())
    except InputError as error:
        said = str(error)
    assert len(said) < 300


@pytest.mark.parametrize(
    "form", [{"grammar": "start: /b+/ /b+/"}, {"grammar": 'start: "a" start'}, {"regex": "a{50000}"}], ids=str
)
def test_a_form_whose_bytes_are_all_given_for_ever_is_read_at_once(form: dict[str, str]) -> None:
    """And goes on to the end of the answer, whatever its length."""
    matcher = grammar(**form).matcher()
    for _ in range(1000):
        (only,) = allowed(matcher)
        matcher.accept(only)
    assert not matcher.complete


@pytest.mark.parametrize("name", WITHOUT)
def test_a_tokenizer_that_the_library_does_not_know_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="structured outputs do not work with this checkpoint's tokenizer"):
        grammar(name, json_object=True)


def test_without_an_end_token_there_are_no_forms() -> None:
    for none in ((), (PADDED,)):
        without = Tokenizer(replace(VOCABULARIES[BYTE_LEVEL], eos_token_ids=none))
        with pytest.raises(UnsupportedModel, match="end token"):
            without.grammar(StructuredOutputsParams(json_object=True), PADDED)


def test_no_room_for_the_stack_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(InputError, match="256 MiB of address space"):
        grammar(json_object=True)


def test_several_forms_are_read_at_once() -> None:
    """One that takes seconds holds up nobody else's."""
    together, made = threading.Barrier(2, timeout=LIMIT_S), list[object]()

    def make() -> LLMatcher:
        together.wait()
        return cast(LLMatcher, object())

    readers = [threading.Thread(target=lambda: made.append(_with_a_large_stack(make))) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(LIMIT_S)
    assert len(made) == 2
