"""Which calls may come, and in which form: alone, or beside JSON of the client's own form."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.server.serving import NAME, VOCAB, Script, chat_tokenizer, client_of, service_of
from tsqp.errors import InputError
from tsqp.server.response_format import form_of
from tsqp.server.tools import Function, ToolUse, _form, end_of_call
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
from tsqp.trusted.text.tool_calls import ToolFormat

TOKENIZER = chat_tokenizer()
FUNCTIONS = [Function(name=name) for name in ("one", "two", "three")]
TOOLS = [{"type": "function", "function": {"name": one.name}} for one in FUNCTIONS]
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Oslo"]}},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


def call(name: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'


def is_complete(form: StructuredOutputsParams, text: str) -> bool:
    """Whether an answer of this form may be this text."""
    matcher = TOKENIZER.grammar(form, VOCAB).matcher()
    try:
        for token in TOKENIZER.encode(text, special_tokens=False):
            matcher.accept(token)
    except InputError:
        return False
    return matcher.complete


def chat(script: Script, **body: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        messages = [{"role": "user", "content": "Hi"}]
        async with client_of(service_of(script)) as client:
            return await client.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **body})

    return asyncio.run(asked())


def form_for(**body: Any) -> StructuredOutputsParams | None:
    """What the engine is told of a request."""
    script = Script("a")
    answer = chat(script, **body)
    assert answer.status_code == 200, answer.text
    return script.opened[0].params.structured_outputs


def test_beside_tools_that_may_be_called_an_answer_has_its_form_or_is_calls() -> None:
    form = form_for(tools=TOOLS, response_format=FORMAT)
    assert form is not None
    for text in ('{"city":"Oslo"}', call("one"), f"{call('one')}\n{call('three')}"):
        assert is_complete(form, text), text
    for text in ('{"city":"Rome"}', "Oslo", call("four"), call("one") + '{"city":"Oslo"}', ""):
        assert not is_complete(form, text), text
    anything = form_for(tools=TOOLS, response_format={"type": "json_object"}, parallel_tool_calls=False)
    assert anything is not None
    assert is_complete(anything, '{"a":[1]}')
    assert is_complete(anything, call("one"))
    assert not is_complete(anything, f"{call('one')}\n{call('three')}")
    assert not is_complete(anything, "[1]")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "two"}}])
def test_a_call_that_must_come_comes_before_a_form(choice: Any) -> None:
    form = form_for(tools=TOOLS, tool_choice=choice, response_format=FORMAT)
    assert form is not None
    assert is_complete(form, call("two"))
    assert not is_complete(form, '{"city":"Oslo"}')


def test_without_calls_the_form_is_all() -> None:
    assert form_for(tools=TOOLS, tool_choice="none", response_format=FORMAT) == form_for(response_format=FORMAT)


def test_an_answer_that_is_json_is_text_and_one_that_is_a_call_is_a_call() -> None:
    answered, called = (
        chat(Script(text), tools=TOOLS, response_format=FORMAT).json()["choices"][0]
        for text in ('{"city":"Oslo"}', call("two"))
    )
    assert (answered["message"]["content"], answered["finish_reason"]) == ('{"city":"Oslo"}', "stop")
    assert "tool_calls" not in answered["message"]
    assert called["message"]["tool_calls"][0]["function"] == {"name": "two", "arguments": "{}"}
    assert called["finish_reason"] == "tool_calls"


def test_the_format_of_llama_takes_either_too() -> None:
    """Also where the answer has keys of a call; what the arguments refer to is found."""
    named = {"type": "object", "properties": {"name": {"enum": ["x", "one"]}}, "additionalProperties": False}
    functions = [*FUNCTIONS, Function(name="where", parameters=CITY)]
    for schema, answer in ((CITY, '{"city":"Oslo"}'), (named, '{"name":"x"}'), (named, '{"name":"one"}')):
        form = _form(functions, "llama3", True, form_of("json_schema", schema, ""))
        for text in (answer, '{"name":"one","parameters":{}}', '{"name":"where","parameters":{"city":"Oslo"}}'):
            assert is_complete(form, text), text
        for text in (
            '{"name":"four","parameters":{}}',
            '{"name":"where","parameters":{}}',
            '{"name":"one","parameters":',
        ):
            assert not is_complete(form, text), text


ALLOWED = [{"type": "function", "name": "one"}, {"type": "function", "name": "three"}]
OF_CHAT = [{"type": "function", "function": {"name": one["name"]}} for one in ALLOWED]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools", "mode": "required", "tools": ALLOWED},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": OF_CHAT}},
    ],
)
def test_the_functions_that_may_be_called_can_be_narrowed(choice: Any) -> None:
    form = form_for(tools=TOOLS, tool_choice=choice)
    assert form is not None
    assert [is_complete(form, call(one.name)) for one in FUNCTIONS] == [True, False, True]


def test_a_model_that_may_call_is_told_of_the_functions_it_may_call() -> None:
    script = Script("a")
    choice = {"type": "allowed_tools", "mode": "auto", "tools": ALLOWED}
    assert chat(script, tools=TOOLS, tool_choice=choice).status_code == 200
    told = TOKENIZER.decode(script.opened[0].prompt)
    assert [f'"{one.name}"' in told for one in FUNCTIONS] == [True, False, True]
    assert script.opened[0].params.structured_outputs is None


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools", "mode": "required", "tools": []},
        {"type": "allowed_tools", "mode": "none", "tools": ALLOWED},
        {"type": "allowed_tools", "mode": "auto", "tools": "one"},
        {"type": "allowed_tools", "mode": "auto", "tools": ["one"]},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "canary"}]},
        {"type": "allowed_tools", "mode": "auto", "tools": [*ALLOWED, {"type": "mcp", "server_label": "canary"}]},
    ],
)
def test_a_choice_of_none_of_the_functions_is_refused(choice: Any) -> None:
    answer = chat(Script("a"), tools=TOOLS, tool_choice=choice)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")
    assert "canary" not in answer.text


@pytest.mark.parametrize(
    ("format_", "before", "after"),
    [
        ("hermes", "Well.\n<tool_call>none</tool_call>", "\n</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {"name": {}}, "x": 1}</tool_call>\n', "x"),
        ("llama3", "", "; "),
    ],
)
def test_an_answer_of_one_call_ends_where_its_object_closes(format_: ToolFormat, before: str, after: str) -> None:
    """And not with what only looks like a call. Each answer is looked at by itself."""
    key = "arguments" if format_ == "hermes" else "parameters"
    call = f'{"<tool_call>" if format_ == "hermes" else ""}{{"name": "f", "{key}": {{"a": "}}}}"}}}}'
    for text in (before + call + after, before + call):
        ends = end_of_call(ToolUse([], format_, None, single=True, named=False))
        assert ends is not None
        assert [ends(character) for character in text].index(True) == len(before + call) - 1
    assert end_of_call(ToolUse([], format_, None, single=False, named=False)) is None
    assert end_of_call(None) is None


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"properties": {"a": inner}}
    return inner


@pytest.mark.parametrize("parameters", [nested(400), {"properties": {"a": {"enum": ["x" * 70_000]}}}])
@pytest.mark.parametrize("beside", [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}])
def test_tools_that_cannot_be_read_are_refused(parameters: dict[str, Any], beside: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert chat(Script("a"), tools=tools, **beside).status_code == 400


def test_tools_that_are_nested_too_deeply_for_a_template_are_refused() -> None:
    answer = chat(Script("a"), tools=[{"type": "function", "function": {"name": "f", "parameters": nested(100)}}])
    assert answer.status_code == 400
    assert "nested" in answer.json()["error"]["message"]


def test_a_form_of_calls_that_is_too_long_names_what_is_at_fault() -> None:
    long = {"properties": {"a": {"enum": ["x" * 70_000]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": long}}]
    required = chat(Script("a"), tools=tools, tool_choice="required").json()["error"]
    either = chat(Script("a"), tools=tools, response_format={"type": "json_object"}).json()["error"]
    assert (required["param"], either["param"]) == ("tools", "response_format")
    assert either["message"].startswith("response_format or tools must be")
