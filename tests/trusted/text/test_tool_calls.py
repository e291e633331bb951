"""Tool calls in an answer: the same however it comes in pieces, and never repaired."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import byte_tokenizer
from tsqp.checkpoint.base import TextFormat
from tsqp.errors import OptionError
from tsqp.trusted.text.tokenizer import Tokenizer
from tsqp.trusted.text.tool_calls import (
    PARSERS,
    CallArguments,
    CallStart,
    Event,
    Text,
    ToolCall,
    ToolFormat,
    collect,
    parse,
    tool_format,
    with_parsed_arguments,
)

FORMATS = st.sampled_from(sorted(PARSERS))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}<>/ é\n', max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=5,
)
CALLS = st.lists(
    st.tuples(st.text('ab_"é', min_size=1, max_size=5), st.dictionaries(st.text("xy", max_size=2), VALUES, max_size=3)),
    max_size=3,
)
WORDS = st.text("ab .,<{", min_size=1, max_size=8).map(lambda text: f"x{text}x")  # no space at its ends
FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "<|python_tag|>", " ", "\n", ";", "x", "{", "}", '"', "\\", ",", ":"),
        *(
            ',"strict":true',
            '{"name": "f", "arguments": {',
            '{"name":"f","parameters":{}}',
            '"a": [1, "}"]',
            '"name"',
            '"id": 3',
            "é",
        ),
    ]
)


def written(format: ToolFormat, name: str, arguments: dict[str, Any], ascii_only: bool = True) -> str:
    values = {"name": name, "arguments" if format == "hermes" else "parameters": arguments}
    text = json.dumps(values, ensure_ascii=ascii_only)
    return f"<tool_call>\n{text}\n</tool_call>" if format == "hermes" else text


def answer_of(format: ToolFormat, before: str, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool = True) -> str:
    texts = [written(format, *call, ascii_only) for call in calls]
    return f"{before}\n" * (format == "hermes" and bool(before)) + ("\n" if format == "hermes" else "; ").join(texts)


def streamed(format: ToolFormat, parts: list[str]) -> list[Event]:
    parser = PARSERS[format]()
    return [*(event for part in parts for event in parser.push(part)), *parser.finish()]


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@given(FORMATS, st.just("") | WORDS, CALLS, st.booleans(), st.lists(st.integers(0, 10_000), max_size=20))
def test_calls_and_text_come_back_whatever_the_pieces(
    format: ToolFormat, before: str, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool, cuts: list[int]
) -> None:
    answer = answer_of(format, before, calls, ascii_only)
    for text, found in (parse(answer, format), collect(streamed(format, split(answer, cuts)))):
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls
        assert all(call.complete for call in found)
        assert text == ((before if format == "hermes" else "") if calls else answer)


@settings(max_examples=400)
@given(FORMATS, st.lists(FRAGMENTS, max_size=14), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_text_in_any_pieces_gives_the_same(format: ToolFormat, fragments: list[str], cuts: list[int]) -> None:
    answer = "".join(fragments)
    whole = parse(answer, format)
    assert collect(streamed(format, split(answer, cuts))) == whole
    assert collect(streamed(format, list(answer))) == whole


@given(FORMATS, CALLS.filter(bool), st.integers(0, 10_000), st.booleans())
def test_an_answer_that_is_cut_has_the_beginning_of_its_calls_and_no_more(
    format: ToolFormat, calls: list[tuple[str, dict[str, Any]]], cut: int, one_by_one: bool
) -> None:
    answer = answer_of(format, "", calls)
    part = answer[: cut % (len(answer) + 1)]
    _, whole = parse(answer, format)
    text, found = collect(streamed(format, list(part))) if one_by_one else parse(part, format)
    assert len(found) <= len(whole)
    for got, expected in zip(found, whole, strict=False):
        assert got.name == expected.name
        assert expected.arguments.startswith(got.arguments)
        assert got.complete == (got.arguments == expected.arguments)
    assert all(got == expected for got, expected in zip(found[:-1], whole, strict=False))
    assert not text or text in part


def test_events_have_their_place_and_arguments_come_while_they_are_written() -> None:
    answer = answer_of("hermes", "Let me see.", [("f", {"a": 1}), ("g", {})])
    events = streamed("hermes", list(answer))
    assert [event for event in events if isinstance(event, CallStart)] == [CallStart(0, "f"), CallStart(1, "g")]
    assert [event.text for event in events if isinstance(event, CallArguments) and event.index == 0] == list('{"a": 1}')
    assert "".join(event.text for event in events if isinstance(event, Text)) == "Let me see."
    parser = PARSERS["llama3"]()
    assert parser.push('{"name": "f", "parameters": {"a": 1') == [CallStart(0, "f"), CallArguments(0, '{"a": 1')]


NO_CALLS: list[tuple[ToolFormat, str]] = [
    ("hermes", "plain text with < and {"),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\nno JSON\n</tool_call>"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>["name"]</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", '<tool_call>{"name" "f", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>'),
    ("llama3", 'The call is {"name": "f", "parameters": {}}'),
    ("llama3", '{"city": "Paris"}'),
    ("llama3", '{"name": "f", "city": {}}'),
    ("llama3", '{"name": "f"}'),
    ("llama3", '{"name": "f", "parameters": []}'),
    ("llama3", "<|python_tag|>print(1)"),
    ("llama3", "<|python"),
    ("llama3", "; {"),
    ("llama3", "  \n"),
]


@pytest.mark.parametrize(("format", "answer"), NO_CALLS)
def test_what_is_no_call_is_text_all_of_it(format: ToolFormat, answer: str) -> None:
    assert parse(answer, format) == (answer, [])
    assert collect(streamed(format, list(answer))) == (answer, [])


OTHER_KEYS = (  # after a call's own
    ',"strict":true',
    ', "strict" : {"a": ["}"]} , "x": null',
    ',"arguments":null,"name":3',
    ',"a":"\\x","\\x":"\n"',
    ",",
)
CALLS_OF_MODELS: list[tuple[ToolFormat, str, str, list[ToolCall]]] = [
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', "", [ToolCall("f", "{}")]),
    ("llama3", '{"type": "function", "name": "f", "parameters": {"a": null}}', "", [ToolCall("f", '{"a": null}')]),
    ("llama3", '{"name": "f", "name": "g", "parameters": {}}', "", [ToolCall("f", "{}")]),
    ("llama3", '{"parameters": {"b": "}"}, "name": "f"}\n', "", [ToolCall("f", '{"b": "}"}')]),
    (
        "llama3",
        '{"name":"f","parameters":{}};{"name":"g","parameters":{}};',
        "",
        [ToolCall("f", "{}"), ToolCall("g", "{}")],
    ),
    ("llama3", '{"name":"f","parameters":{}} Done.', "Done.", [ToolCall("f", "{}")]),
    ("llama3", '{"name":"f","parameters":{}}; {"x":1}', '; {"x":1}', [ToolCall("f", "{}")]),
    ("hermes", 'a\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\nb', "ab", [ToolCall("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call> a b  c', "a b  c", [ToolCall("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [ToolCall("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_c', "", [ToolCall("f", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
        "",
        [ToolCall("f", '{"a": tru}', False)],
    ),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "<tool_call>",
        [ToolCall("f", "{}")],
    ),
    ("hermes", '<tool_call>{"id": 1.5e-3, "name": "f", "arguments": {}}</tool_call>', "", [ToolCall("f", "{}")]),
    *(
        call
        for rest in OTHER_KEYS
        for call in (
            ("llama3", f'{{"name":"f","parameters":{{"a":1}}{rest}}}', "", [ToolCall("f", '{"a":1}')]),
            ("hermes", f'<tool_call>{{"arguments":{{}},"name":"f"{rest}}}</tool_call>', "", [ToolCall("f", "{}")]),
        )
    ),
]


@pytest.mark.parametrize(("format", "answer", "text", "calls"), CALLS_OF_MODELS)
def test_what_models_write(format: ToolFormat, answer: str, text: str, calls: list[ToolCall]) -> None:
    assert parse(answer, format) == (text, calls)
    assert collect(streamed(format, list(answer))) == (text, calls)


def test_json_that_is_no_call_is_not_held_back() -> None:
    assert collect(PARSERS["llama3"]().push('{"city": "Par')) == ('{"city": "Par', [])
    assert collect(PARSERS["hermes"]().push('<tool_call>{"city": "Par')) == ('<tool_call>{"city": "Par', [])


def test_the_format_is_the_one_that_the_template_asks_for() -> None:
    assert tool_format("{{ '<tool_call>' }}") == "hermes"
    assert tool_format('Respond in the format {"name": function name, "parameters": dictionary}') == "llama3"
    assert tool_format("{{ tools }}") is None


@pytest.mark.parametrize(
    "call",
    [
        "<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>",  # Qwen3-Coder
        "<tool_call>name\n<arg_key>key</arg_key>\n<arg_value>value</arg_value>\n</tool_call>",  # GLM
    ],
)
def test_calls_of_xml_between_the_tags_of_hermes_are_another_format(call: str) -> None:
    assert tool_format(f"{{{{ tools }}}}{call}") is None


def test_the_tokenizer_knows_the_format_of_its_template_for_tools() -> None:
    def made(template: str | None, tools: str | None = None) -> Tokenizer:
        return Tokenizer(TextFormat(byte_tokenizer().to_str(), (), template, tools))

    assert made("{{ tools }}<tool_call>").tool_format == "hermes"
    assert made("plain", "{{ tools }}<tool_call>").tool_format == "hermes"
    for template in (None, "plain <tool_call>", "{{ tools }}"):
        with pytest.raises(OptionError, match="tools"):
            _ = made(template).tool_format


def test_arguments_of_the_api_become_mappings_for_a_template() -> None:
    def messages(arguments: object) -> list[dict[str, object]]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]

    given_messages = messages('{"a": 1}')
    assert with_parsed_arguments(given_messages) == messages({"a": 1})
    assert given_messages == messages('{"a": 1}')
    for kept in ('{"a": ', "[1]", {"a": 1}, "[" * 100_000):
        assert with_parsed_arguments(messages(kept)) == messages(kept)
    odd: list[dict[str, object]] = [{"tool_calls": None}, {"tool_calls": [3, {"function": 3}]}]
    assert with_parsed_arguments(odd) == odd
