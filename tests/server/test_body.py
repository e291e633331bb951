"""Bodies: strict about what they hold, lenient about what is unknown, silent about what was in them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.serving import NAME, Script, client_of, service_of
from tsqp.server.body import converted, ignored, parsed
from tsqp.server.chat_types import ChatBody
from tsqp.server.completions_types import CompletionBody
from tsqp.server.errors import ApiError
from tsqp.server.responses_types import ResponsesBody
from tsqp.server.settings import ServerSettings

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
CANARY = "canary-4711"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.just(CANARY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([CANARY, "type", "a"]), inner),
    max_leaves=8,
)
FIELDS = [
    *("model", "messages", "prompt", "input", "n", "stop", "logit_bias", "tools", "tool_choice", "response_format"),
    *("temperature", "stream_options", "text", "audio", "suffix", "store", "logprobs", "chat_template_kwargs"),
]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"1", b'"text"', b'{"a": 1} x', b"\xff", b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": NaN}'),
        *(b'{"a": -Infinity}', b'{"a": 1e999}', b"[" * 100_000, b'{"a":' * 100_000),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parsed(body)
    assert (refused.value.status, refused.value.body.code) == (400, "invalid_json")
    assert refused.value.__context__ is None


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([ChatBody, CompletionBody, ResponsesBody]))
def test_no_error_repeats_or_holds_a_value(values: dict[str, Any], type: Any) -> None:
    error: ApiError | None = None
    try:
        converted(values, type)
    except ApiError as raised:
        error = raised
    if error is not None:
        assert error.status == 400
        assert CANARY not in error.encode().decode()
        assert error.__context__ is None
        assert len(error.encode()) <= 4096


@pytest.mark.parametrize(
    ("values", "param", "text"),
    [
        ({}, "model", "model is missing"),
        ({"model": 3}, "model", "model must be str, not int"),
        ({**CHAT, "temperature": "1"}, "temperature", "temperature must be float | null, not str"),
        ({**CHAT, "n": 1.5}, "n", "n must be int | null, not float"),
        ({**CHAT, "n": True}, "n", "n must be int | null, not bool"),
        (
            {**CHAT, "messages": [{"role": CANARY}]},
            "messages[0].role",
            "messages[0].role has a value that is not allowed",
        ),
        ({**CHAT, "messages": [{}]}, "messages[0].role", "messages[0].role is missing"),
        ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias", "logit_bias must be int, not str"),
        ({**CHAT, "logit_bias": {"1": "x"}}, "logit_bias", "logit_bias must be float, not str"),
    ],
)
def test_an_error_names_the_field(values: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ApiError) as refused:
        converted(values, ChatBody)
    assert (refused.value.body.param, refused.value.body.message) == (param, text)


def test_null_is_the_same_as_nothing() -> None:
    nulls = dict.fromkeys([*ChatBody.refused, "n", "stop", "tools", "stream_options", "seed"])
    assert converted({**CHAT, **nulls}, ChatBody) == converted(CHAT, ChatBody)


@pytest.mark.parametrize("type", [ChatBody, CompletionBody, ResponsesBody])
def test_what_is_known_and_not_honoured_is_refused_by_name(type: Any) -> None:
    base = {"model": NAME, "messages": CHAT["messages"], "prompt": "x", "input": "x"}
    base = {name: value for name, value in base.items() if name not in type.refused}
    assert type.refused
    for name, allowed in type.refused.items():
        with pytest.raises(ApiError) as refused:
            converted({**base, name: {"x": 1}}, type)
        assert (refused.value.body.param, refused.value.body.code) == (name, "unsupported_parameter")
        for value in allowed:
            converted({**base, name: value}, type)
        with pytest.raises(ApiError):
            converted({**base, name: 0}, type)  # which equals False and is not it


def test_unknown_fields_are_named_in_a_header_or_refused() -> None:
    async def answers(strict: bool) -> Any:
        service = service_of(Script("a"), settings=ServerSettings(strict_params=strict))
        body = {**CHAT, "user": "me", "x\r\nset-cookie: é": 1, "stream": True, "stream_options": {"y": 1}}
        async with client_of(service) as client:
            return await client.post("/v1/chat/completions", json=body)

    lenient, strict = asyncio.run(answers(False)), asyncio.run(answers(True))
    assert lenient.status_code == 200
    assert lenient.headers["x-tsqp-ignored"] == "user, x?set-cookie?, stream_options.y"
    assert (strict.status_code, strict.json()["error"]["code"]) == (400, "unknown_parameter")
    assert strict.headers["x-tsqp-ignored"] == lenient.headers["x-tsqp-ignored"]
    assert "cookie" not in strict.text


FUNCTION = {"name": "f", "parameters": {"type": "object", "x": 1}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PART = {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}
ANSWER = {"type": "message", "role": "assistant", "id": "1", "status": "completed", "content": [PART]}
OF_A_CALL = {"call_id": "c", "id": "2", "status": "completed"}


@pytest.mark.parametrize(
    ("type", "values", "names"),
    [
        (ChatBody, {"messages": [{"role": "user", "content": "a", "foo": 1}]}, ["messages[0].foo"]),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {**PART, "x\r\n[y]": {}}]}]},
            ["messages[0].content[1].x?y?"],
        ),
        (
            ChatBody,
            {"messages": [{"role": "assistant", "tool_calls": [CALL, {**CALL, "index": 0}]}, {"role": "user", "é": 0}]},
            ["messages[0].tool_calls[1].index", "messages[1].?"],
        ),
        (ChatBody, {"tools": [{"type": "function", "function": {**FUNCTION, "foo": 1}}]}, ["tools[0].function.foo"]),
        (ChatBody, {"tool_choice": {"a": 1}, "logit_bias": {"1": 2}, "chat_template_kwargs": {"x": [{"y": 1}]}}, []),
        (ChatBody, {"messages": [{"role": "assistant", "content": "a", "refusal": None, "audio": None}]}, []),
        (ChatBody, {"foo": None, "audio": None}, []),
        (CompletionBody, {"prompt": [[1, 2]], "stop": ["a"], "foo": {"bar": 1}}, ["foo"]),
        (
            ResponsesBody,
            {
                "input": [
                    {"role": "user", "content": "a"},
                    ANSWER,
                    {**OF_A_CALL, "type": "function_call", "name": "f", "arguments": "{}"},
                    {**OF_A_CALL, "type": "function_call_output", "output": "r"},
                ]
            },
            [],
        ),
        (
            ResponsesBody,
            {
                "input": [
                    {"type": None, "role": "user", "content": [{"type": "input_text", "text": "a", "foo": 1}]},
                    {**OF_A_CALL, "type": "function_call", "name": "f", "arguments": "{}", "role": "user"},
                    {**OF_A_CALL, "type": "function_call_output", "output": "r", "name": "f"},
                ],
                "text": {"format": {"type": "text", "bar": 1}},
                "tools": [{**FUNCTION, "type": "function", "foo": 1}],
            },
            ["input[0].content[0].foo", "input[1].role", "input[2].name", "text.format.bar", "tools[0].foo"],
        ),
    ],
)
def test_what_is_ignored_is_named_wherever_it_stands(type: Any, values: dict[str, Any], names: list[str]) -> None:
    base = {"model": NAME, "messages": CHAT["messages"], "prompt": "x", "input": "x"}
    known = {name: value for name, value in base.items() if name in type.__struct_fields__}
    whole = type.completed({**known, **values})
    converted(whole, type)
    assert list(ignored(whole, type)) == names


def test_many_and_long_names_make_no_long_header() -> None:
    async def test() -> None:
        async with client_of(service_of(Script("a"))) as client:
            names = {f"{index}{'x' * 1000}": 1 for index in range(1000)}
            answer = await client.post("/v1/chat/completions", json={**CHAT, **names})
            ignored = answer.headers["x-tsqp-ignored"]
            assert len(ignored) <= 20 * 66 + 3
            assert ignored.endswith("x, ...")
            answer = await client.post(
                "/v1/chat/completions", json={**CHAT, **dict.fromkeys("abcdefghijklmopqrsuv", 1)}
            )
            assert answer.headers["x-tsqp-ignored"] == ", ".join("abcdefghijklmopqrsuv")

    asyncio.run(test())


def test_a_page_of_another_origin_cannot_send_what_is_read() -> None:
    """A browser asks the server before it sends JSON, and not before it sends plain text."""

    async def test() -> None:
        async with client_of(service_of(Script("a"))) as client:
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                answer = await client.post(
                    "/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind}
                )
                assert answer.status_code == 415
            kind = "application/json; charset=utf-8"
            answer = await client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind})
            assert answer.status_code == 200

    asyncio.run(test())


@given(st.lists(st.text(max_size=3) | st.just(""), min_size=1, max_size=4))
def test_whatever_a_field_is_called_its_name_may_stand_in_a_header(names: list[str]) -> None:
    """An empty one too: a header that ends with a space is none, and the answer was lost."""

    async def test() -> None:
        async with client_of(service_of(Script("a"))) as client:
            answer = await client.post("/v1/chat/completions", json={**CHAT, **dict.fromkeys(names, 1)})
            h11.Response(status_code=200, headers=answer.headers.raw)
            assert answer.status_code == 200
            assert all(answer.headers["x-tsqp-ignored"].split(", "))

    asyncio.run(test())
