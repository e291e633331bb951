"""The form of an answer is the same whole and as a stream, and an answer that broke off has none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import EvidenceRefused
from tsqp.tee.answer_form import MAX_ANSWER_BYTES, read_answer
from tsqp.tee.receipts import Path

CHAT: Path = "/v1/chat/completions"
COMPLETIONS: Path = "/v1/completions"
RESPONSES: Path = "/v1/responses"
PATHS: tuple[Path, ...] = (CHAT, COMPLETIONS, RESPONSES)

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
    assert read_answer(body.encode(), CHAT) == form(every)
    assert read_answer(stream(chat_events(every)), CHAT) == form(every)


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
    assert read_answer(json.dumps({"choices": whole}).encode(), COMPLETIONS) == form(every)
    assert read_answer(stream([*parts, *ends]), COMPLETIONS) == form(every)


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
    assert read_answer(json.dumps(response(*one)).encode(), RESPONSES) == form([one])
    assert read_answer(stream(response_events(*one), end=""), RESPONSES) == form([one])


ONE: Choices = [(["ab", "c"], [("f", ["{", "}"])], "stop")]


@given(cut=st.integers(0, len(chat_events(ONE)) - 3))
def test_a_stream_that_broke_off_has_none(cut: int) -> None:
    with pytest.raises(EvidenceRefused, match="one that broke off"):
        read_answer(stream(chat_events(ONE)[: cut + 1]), CHAT)


@pytest.mark.parametrize(
    ("path", "events"),
    [
        (CHAT, [*chat_events(ONE)[:-2], {"error": {"message": "x"}}]),
        (CHAT, [*chat_events(ONE), *chat_events(ONE)]),
        (CHAT, [*chat_events(ONE)[:3], *chat_events(ONE)[4:]]),  # arguments without a call
        (CHAT, [*chat_events(ONE), {"more": 1}]),
        (CHAT, []),
        (CHAT, [{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": -1, "function": {"arguments": "x"}}]}}]}]),
        (CHAT, [{"choices": 1}]),
        (RESPONSES, [*response_events(*ONE[0])[:-1], {"type": "error", "message": "x"}]),
        (RESPONSES, [*response_events(*ONE[0]), {"type": "response.output_text.delta", "delta": "x"}]),
        (RESPONSES, [*response_events(*ONE[0])[:1], *response_events(*ONE[0])[2:]]),  # the last one has more text
        (RESPONSES, [{"type": "response.function_call_arguments.delta", "delta": "x"}]),
        (RESPONSES, [{"more": 1}, *response_events(*ONE[0])]),
    ],
)
def test_no_other_stream_has_one(path: Path, events: list[dict[str, Any]]) -> None:
    with pytest.raises(EvidenceRefused, match="refused: answer is "):
        read_answer(stream(events), path)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"error": {"message": "x"}}),
        (CHAT, {"choices": []}),
        (CHAT, {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": None}]}),
        (CHAT, {"id": "x"}),
        (COMPLETIONS, {"choices": [{"index": 0, "text": "x", "finish_reason": None}]}),
        (RESPONSES, {**response(*ONE[0]), "status": "in_progress"}),
        (RESPONSES, {"id": "x"}),
    ],
)
def test_no_other_body_has_one(path: Path, body: dict[str, Any]) -> None:
    with pytest.raises(EvidenceRefused, match="refused: answer is "):
        read_answer(json.dumps(body).encode(), path)


TEXT = "Transfer it. If the board agrees."
FIRST, REST = "Transfer it.", " If the board agrees."


def chat_body(*, more: dict[str, Any] | None = None, **message: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **(more or {})}]}


def text_body(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": "stop", **more}]}


def responses_body(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "r", "status": "completed", "output": list(items), **more}


def message(text: str, **part: Any) -> dict[str, Any]:
    return {"type": "message", "content": [{"type": "output_text", "text": text, **part}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body(content=FIRST, more={"delta": {"content": REST}})),
        (CHAT, chat_body(content=FIRST, more={"text": REST})),
        (CHAT, chat_body(content=TEXT, refusal="No.")),
        (CHAT, chat_body(content=TEXT, reasoning_content="No.")),
        (CHAT, text_body(TEXT)),
        (CHAT, {**chat_body(content="No."), **responses_body(message(TEXT))}),
        (CHAT, {**chat_body(content=TEXT), **responses_body(message("No."))}),
        (CHAT, responses_body(message(TEXT))),
        (COMPLETIONS, chat_body(content=TEXT)),
        (COMPLETIONS, text_body(FIRST, message={"content": REST})),
        (COMPLETIONS, text_body(TEXT, delta={"content": "No."})),
        (COMPLETIONS, {**text_body("No."), **responses_body(message(TEXT))}),
        (RESPONSES, {**chat_body(content="No."), **responses_body(message(TEXT))}),
        (RESPONSES, chat_body(content=TEXT)),
        (RESPONSES, responses_body(message(FIRST), {**message(REST), "type": "reasoning"})),
        (RESPONSES, responses_body(message(FIRST), message(REST, type="reasoning_text"))),
        (RESPONSES, responses_body(message(TEXT, refusal="No."))),
    ],
)
def test_no_body_that_reads_otherwise_has_the_form(path: Path, body: dict[str, Any]) -> None:
    """Its reader, who is one of this endpoint, would see another text than the receipt is of."""
    assert TEXT.encode() in read_answer(json.dumps(chat_body(content=TEXT)).encode(), CHAT)
    with pytest.raises(EvidenceRefused, match="refused: answer is "):
        read_answer(json.dumps(body).encode(), path)


def chunk(reason: str | None = None, **choice: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "finish_reason": reason, **choice}]}


def done(type: str, **fields: Any) -> list[dict[str, Any]]:
    """A stream of ``TEXT`` with one more event, in front of the last."""
    whole = {"type": "response.completed", "response": responses_body(message(TEXT))}
    return [{"type": "response.output_text.delta", "delta": TEXT}, {"type": type, **fields}, whole]


@pytest.mark.parametrize(
    ("path", "events"),
    [
        (CHAT, [chunk(delta={"content": FIRST}), chunk("stop", delta={}, message={"content": REST})]),
        (CHAT, [chunk(delta={"content": FIRST}), chunk("stop", message={"content": REST})]),
        (CHAT, [chunk(delta={"content": FIRST}), chunk("stop", delta={}, text=REST)]),
        (CHAT, [chunk(delta={"content": TEXT}), {"type": "response.output_text.delta", "delta": "No."}]),
        (COMPLETIONS, [chunk(text=FIRST), chunk("stop", text="", delta={"content": REST})]),
        (RESPONSES, [chunk("stop", delta={"content": TEXT})]),
        (RESPONSES, [{**one, **chunk(delta={"content": "No."})} for one in done("response.in_progress")]),
        (RESPONSES, done("response.reasoning_text.delta", delta="No.")),
        (RESPONSES, done("response.refusal.delta", delta="No.")),
        (RESPONSES, done("response.in_progress", response=responses_body(message("No.")))),
        (RESPONSES, done("response.output_text.done", text="No.")),
        (RESPONSES, done("response.content_part.done", part=message("No.")["content"][0])),
        (RESPONSES, done("response.output_item.done", item=message("No."))),
        (RESPONSES, done("response.output_item.done", item={**message(TEXT), "type": "reasoning"})),
        (RESPONSES, done("response.output_item.added", item=message("No."))),
        (RESPONSES, done("response.function_call_arguments.done", arguments="No.")),
    ],
)
def test_no_stream_that_reads_otherwise_has_the_form(path: Path, events: list[dict[str, Any]]) -> None:
    if path == RESPONSES:
        assert TEXT.encode() in read_answer(stream(done("response.output_text.done", text=TEXT)), path)
    with pytest.raises(EvidenceRefused, match="refused: answer is "):
        read_answer(stream(events), path)


def test_nothing_comes_after_the_end_mark() -> None:
    """Where every client has stopped to read."""
    first, last = stream([chunk(delta={"content": FIRST})]), stream([chunk("stop", delta={"content": REST})])
    with pytest.raises(EvidenceRefused, match="refused: answer is one that goes on after its end mark"):
        read_answer(first + last, CHAT)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for one in (data, b"{" + data, b"data: " + data):
        for path in PATHS:
            with pytest.raises(EvidenceRefused):
                read_answer(one, path)


def test_a_file_is_bounded() -> None:
    with pytest.raises(EvidenceRefused, match="or more, and not at most"):
        read_answer(bytes(MAX_ANSWER_BYTES + 1), CHAT)


def test_an_error_is_named_as_one() -> None:
    error = {"error": {"message": "x"}}
    for path, data in (
        *((path, json.dumps(error).encode()) for path in PATHS),
        (CHAT, stream([*chat_events(ONE)[:3], error])),
        (RESPONSES, stream([{"type": "error"}])),
    ):
        with pytest.raises(EvidenceRefused, match="refused: answer is an error"):
            read_answer(data, path)
