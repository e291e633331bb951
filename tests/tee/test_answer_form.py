"""The form of an answer is the same whole and as a stream, and an answer that broke off has none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import EvidenceRefused
from tsqp.tee.answer_form import MAX_ANSWER_BYTES, read_answer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
calls = st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.lists(texts, max_size=3)), max_size=2)
choices = st.lists(
    st.tuples(st.lists(texts, max_size=4), calls, st.sampled_from(["stop", "length"])), min_size=1, max_size=3
)
Choices = list[tuple[list[str], list[tuple[str, list[str]]], str]]


def form(every: Choices) -> bytes:
    """As the page says."""
    told = [
        {
            "finish_reason": reason,
            "index": index,
            "text": "".join(pieces),
            "tool_calls": [{"arguments": "".join(parts), "name": name} for name, parts in called],
        }
        for index, (pieces, called, reason) in enumerate(every)
    ]
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


def stream(events: list[dict[str, Any]], *, end: str = "data: [DONE]\r\n\r\n") -> bytes:
    """With comments and names, as servers send them."""
    lines = [f"event: x\r\ndata: {json.dumps(event)}\r\n\r\n: keep-alive\r\n\r\n" for event in events]
    return "".join([*lines, end]).encode()


def chat_events(every: Choices) -> list[dict[str, Any]]:
    def piece(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": reason}], "obfuscation": "x"}

    events: list[dict[str, Any]] = []
    for index, (pieces, called, reason) in enumerate(every):
        events.append(piece(index, {"role": "assistant", "content": ""}))
        events += [piece(index, {"content": text}) for text in pieces]
        for place, (name, parts) in enumerate(called):
            begun = {"index": place, "id": "call_1", "type": "function", "function": {"name": name, "arguments": ""}}
            events.append(piece(index, {"tool_calls": [begun]}))
            more = [{"index": place, "function": {"arguments": text}} for text in parts]
            events += [piece(index, {"tool_calls": [one]}) for one in more]
        events.append(piece(index, {}, reason))
    return [*events, {"id": "c", "choices": [], "usage": {"total_tokens": 1}}]


@given(choices)
def test_chat_is_the_same_whole_and_as_a_stream(every: Choices) -> None:
    whole = []
    for index, (pieces, called, reason) in enumerate(every):
        made = [{"id": "y", "function": {"name": name, "arguments": "".join(parts)}} for name, parts in called]
        message = {"content": "".join(pieces) or None, **({"tool_calls": made} if made else {})}
        whole.append({"index": index, "message": message, "finish_reason": reason, "logprobs": None})
    body = json.dumps({"id": "c", "object": "chat.completion", "choices": whole[::-1], "usage": {}})
    assert read_answer(body.encode()) == form(every)
    assert read_answer(stream(chat_events(every))) == form(every)


@given(choices)
def test_completions_are_the_same_whole_and_as_a_stream(every: Choices) -> None:
    every = [(pieces, [], reason) for pieces, _, reason in every]
    parts = [
        {"choices": [{"index": index, "text": text, "finish_reason": None}]}
        for index, (pieces, _, _) in enumerate(every)
        for text in pieces
    ]
    ends = [
        {"choices": [{"index": index, "text": "", "finish_reason": reason}]}
        for index, (_, _, reason) in enumerate(every)
    ]
    whole = [
        {"index": index, "text": "".join(pieces), "finish_reason": reason}
        for index, (pieces, _, reason) in enumerate(every)
    ]
    assert read_answer(json.dumps({"choices": whole}).encode()) == form(every)
    assert read_answer(stream([*parts, *ends])) == form(every)


def response(pieces: list[str], called: list[tuple[str, list[str]]], reason: str) -> dict[str, Any]:
    message = {"type": "message", "content": [{"type": "output_text", "text": "".join(pieces)}]}
    made = [{"type": "function_call", "name": name, "arguments": "".join(parts)} for name, parts in called]
    return {"id": "r", "status": STATUS[reason], "output": [message, *made], "error": None}


STATUS = {"stop": "completed", "length": "incomplete"}


def response_events(pieces: list[str], called: list[tuple[str, list[str]]], reason: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"type": "response.created", "response": {"id": "r", "status": "x", "output": []}}]
    events += [{"type": "response.output_text.delta", "delta": text} for text in pieces]
    events += [{"type": "response.output_text.done", "text": "".join(pieces)}]
    for name, parts in called:
        item = {"type": "function_call", "name": name, "arguments": ""}
        events.append({"type": "response.output_item.added", "item": item})
        events += [{"type": "response.function_call_arguments.delta", "delta": text} for text in parts]
        events.append({"type": "response.function_call_arguments.done", "arguments": "".join(parts)})
    return [*events, {"type": f"response.{STATUS[reason]}", "response": response(pieces, called, reason)}]


@given(choices)
def test_responses_are_the_same_whole_and_as_a_stream(every: Choices) -> None:
    one = every[0]
    assert read_answer(json.dumps(response(*one)).encode()) == form([one])
    assert read_answer(stream(response_events(*one), end="")) == form([one])


ONE: Choices = [(["ab", "c"], [("f", ["{", "}"])], "stop")]


@given(cut=st.integers(0, len(chat_events(ONE)) - 3))
def test_a_stream_that_broke_off_has_none(cut: int) -> None:
    with pytest.raises(EvidenceRefused, match="one that broke off"):
        read_answer(stream(chat_events(ONE)[: cut + 1]))


@pytest.mark.parametrize(
    "events",
    [
        [*chat_events(ONE)[:-2], {"error": {"message": "x"}}],
        [*chat_events(ONE), *chat_events(ONE)],
        [*chat_events(ONE)[:3], *chat_events(ONE)[4:]],  # arguments without a call
        [{"more": 1}],
        [],
        [*response_events(*ONE[0])[:-1], {"type": "error", "message": "x"}],
        [*response_events(*ONE[0]), {"type": "response.output_text.delta", "delta": "x"}],
        [*response_events(*ONE[0])[:1], *response_events(*ONE[0])[2:]],  # the last one has more text
        [{"type": "response.function_call_arguments.delta", "delta": "x"}],
        [{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": -1, "function": {"arguments": "x"}}]}}]}],
        [{"choices": 1}],
    ],
)
def test_no_other_stream_has_one(events: list[dict[str, Any]]) -> None:
    with pytest.raises(EvidenceRefused, match="refused: answer is "):
        read_answer(stream(events))


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "x"}},
        {"choices": []},
        {"choices": [{"index": 0, "text": "x", "finish_reason": None}]},
        {"id": "x"},
        {**response(*ONE[0]), "status": "in_progress"},
    ],
)
def test_no_other_body_has_one(body: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefused, match="refused: answer is "):
        read_answer(json.dumps(body).encode())


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for one in (data, b"{" + data, b"data: " + data):
        with pytest.raises(EvidenceRefused):
            read_answer(one)


def test_a_file_is_bounded() -> None:
    with pytest.raises(EvidenceRefused, match="or more, and not at most"):
        read_answer(bytes(MAX_ANSWER_BYTES + 1))


def test_an_error_is_named_as_one() -> None:
    error = {"error": {"message": "x"}}
    for data in (json.dumps(error).encode(), stream([*chat_events(ONE)[:3], error]), stream([{"type": "error"}])):
        with pytest.raises(EvidenceRefused, match="refused: answer is an error"):
            read_answer(data)
