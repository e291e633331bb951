"""Responses: conversations as items, answers as items and events."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.serving import NAME, VOCAB, Script, client_of, events_of, service_of
from tsqp.errors import WorkerLost
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams

URL = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def ask(script: Script, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to bodies, one after the other."""

    async def asked() -> list[httpx.Response]:
        async with client_of(service_of(script)) as client:
            return [await client.post(URL, json={"model": NAME, "input": "Hi", **body}) for body in bodies]

    return asyncio.run(asked())


def without_ids(value: Any) -> Any:
    """The same without what is different each time."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if isinstance(value, dict):
        random = ("id", "item_id", "call_id", "created_at", "obfuscation")
        return {name: without_ids(one) for name, one in value.items() if name not in random}
    return value


def test_an_answer_has_the_shape_of_the_api() -> None:
    script = Script("Hello")
    (answer,) = ask(script, {"instructions": "Be brief", "metadata": {"a": "b"}, "store": False})
    body = answer.json()
    assert body["id"].startswith("resp_")
    (message,) = body.pop("output")
    assert message["id"].startswith("msg_")
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert without_ids(message) == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    prompt = len(script.opened[0].prompt)
    assert without_ids(body) == {
        "object": "response",
        "status": "completed",
        "model": NAME,
        "system_fingerprint": "tsqp-local-0123456789ab",
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + 5,
        },
        "incomplete_details": None,
        "error": None,
        "instructions": "Be brief",
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "background": False,
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
    }
    decoded = script.tokenizer.decode(script.opened[0].prompt)
    assert decoded == "system\nBe brief\nuser\nHi\nassistant\n"


CONVERSATION = [
    {"role": "developer", "content": "D"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "message", "role": "assistant", "id": "1", "content": [{"type": "output_text", "text": "b"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x":1}', "id": "2", "status": "completed"},
    {"type": "function_call", "call_id": "d", "name": "g", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "r"},
]


def test_items_are_the_conversation() -> None:
    script = Script("a")
    ask(script, {"input": CONVERSATION})
    called = ('{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}')
    calls = "".join(f"<tool_call>{call}</tool_call>" for call in called)
    assert script.tokenizer.decode(script.opened[0].prompt) == (
        f"system\nD\nuser\na\nassistant\nb{calls}\ntool\nr\nassistant\n"
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "canary"}]}, "input[0].type"),
        ({"input": [{"type": ["x"]}]}, "input[0].type"),
        ({"input": [{"role": "canary", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [*CONVERSATION, {"type": "function_call_output"}]}, "input[6].call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["canary"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"previous_response_id": "canary"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"conversation": "canary"}, "conversation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    script = Script("a")
    (answer,) = ask(script, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert "canary" not in answer.text
    assert script.opened == []


def test_parameters_reach_the_engine() -> None:
    script = Script("a")
    schema = {"type": "object"}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    body = {"temperature": 0.5, "top_p": 0.25, "max_output_tokens": 9, "seed": 4, "text": form, "cache_salt": "s"}
    (answer,) = ask(script, {**body, "include": ["message.output_text.logprobs"], "top_logprobs": 3})
    opened = script.opened[0]
    params = opened.params
    assert (params.temperature, params.top_p, params.max_tokens, params.seed, params.logprobs) == (0.5, 0.25, 9, 4, 3)
    assert params.structured_outputs == StructuredOutputsParams(json=schema)
    assert opened.salt == "s"
    assert answer.json()["text"] == form


def test_events_have_the_order_of_the_api() -> None:
    (stream,) = ask(Script("Hi"), {"stream": True})
    events = events_of(stream.text)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(10))
    names = [line.removeprefix("event: ") for line in stream.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert "[DONE]" not in stream.text
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert events[0]["response"]["status"] == "in_progress"
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


TEXTS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(max_examples=30)
@given(st.lists(TEXTS | st.just(CALL), max_size=4), st.integers(1, 300), st.booleans())
def test_the_events_are_the_whole_answer(parts: list[list[int] | str], most: int, parallel: bool) -> None:
    """Texts and calls, in any order, whole and cut."""
    tokenizer = Script().tokenizer
    lists = [tokenizer.encode(part, special_tokens=False) if isinstance(part, str) else part for part in parts]
    tokens = [token for part in lists for token in part]
    body = {"tools": [TOOL], "max_output_tokens": most, "parallel_tool_calls": parallel}
    whole, stream = ask(Script(tokens), body, {**body, "stream": True})
    events = events_of(stream.text)
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert without_ids(last) == without_ids(whole.json())
    assert (last["status"] == "incomplete") == (last["incomplete_details"] == {"reason": "max_output_tokens"})
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert done
    for index, item in enumerate(done):
        mine = [event for event in events if event.get("output_index") == index]
        assert mine[0]["type"] == "response.output_item.added"
        assert mine[0]["item"]["id"] == item["id"]
        deltas = "".join(event["delta"] for event in mine if event["type"].endswith(".delta"))
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert item["status"] == ("completed" if index < len(done) - 1 else last["status"])


def test_an_answer_that_is_cut_says_so() -> None:
    whole, stream = ask(Script("Hello"), *({"max_output_tokens": 2, "stream": stream} for stream in (False, True)))
    assert events_of(stream.text)[-1]["type"] == "response.incomplete"
    response = whole.json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], response["output"][0]["content"][0]["text"]) == ("incomplete", "He")


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_of_one_call_ends_with_it(stream: bool) -> None:
    call = CALL.partition("\n</tool_call>")[0]
    body = {"tools": [TOOL], "parallel_tool_calls": False, "max_output_tokens": len(call), "stream": stream}
    (answer,) = ask(Script(f"{CALL}b" * 9), body)
    response = events_of(answer.text)[-1]["response"] if stream else answer.json()
    assert (response["status"], response["usage"]["output_tokens"]) == ("completed", len(call))
    assert [(item["type"], item["status"]) for item in response["output"]] == [("function_call", "completed")]


def test_calls_are_items() -> None:
    (answer,) = ask(Script(f"Well.\n{CALL}"), {"tools": [TOOL]})
    message, call = answer.json()["output"]
    assert message["content"][0]["text"] == "Well."
    assert call["call_id"].startswith("call_")
    assert call["id"].startswith("fc_")
    assert without_ids(call) == {
        "type": "function_call",
        "status": "completed",
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
    }


LOGPROBS = {"include": ["message.output_text.logprobs"], "tools": [TOOL]}


@pytest.mark.parametrize("before", ["", "Well.\n", "<b>\n"])
def test_tokens_of_a_call_are_no_log_probabilities_of_a_text(before: str) -> None:
    """Nor do they make a message where there is no text."""
    whole, stream = ask(Script(f"{before}{CALL}"), LOGPROBS, {**LOGPROBS, "stream": True})
    output = whole.json()["output"]
    assert without_ids(events_of(stream.text)[-1]["response"]["output"]) == without_ids(output)
    assert [item["type"] for item in output] == ["message"] * bool(before) + ["function_call"]
    for item in output[:-1]:
        (part,) = item["content"]
        assert part["text"] == before.rstrip()
        assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]


@pytest.mark.parametrize("text", ["Well, <b> and {", "<tool_", "<tool_call>none", "{", "\n", "Hi \n", ""])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_log_probabilities_of_a_text_are_of_all_its_tokens(text: str, tools: Any) -> None:
    """Also of those whose text was held back, because it might have become a call."""
    whole, stream = ask(Script(text), *({**LOGPROBS, "tools": tools, "stream": stream} for stream in (False, True)))
    (item,) = whole.json()["output"]
    (part,) = item["content"]
    assert part["text"] == text
    assert "".join(entry["token"] for entry in part["logprobs"]) == text
    deltas = [event for event in events_of(stream.text) if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]


def test_an_error_after_headers_is_an_event_of_both_shapes() -> None:
    (stream,) = ask(Script([104, WorkerLost("canary")]), {"stream": True})
    last = events_of(stream.text)[-1]
    assert last["type"] == "error"
    assert last["error"]["message"] == last["message"]
    assert last["code"] == last["error"]["code"] == "worker_lost"
    assert "response.completed" not in stream.text
    assert "canary" not in stream.text
