"""Bodies that are nearly right: an answer or a refusal, never a failure, and what began has ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.serving import NAME, Script, client_of, events_of, service_of
from tsqp.errors import NumericError, QueueFull
from tsqp.server.meters import Reason

CANARY = "canary-4711"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAMPLING: dict[str, Any] = {
    "model": NAME,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 1,
    "repetition_penalty": 1.1,
    "cache_salt": "x",
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
}
CHOICES: dict[str, Any] = {
    **SAMPLING,
    "n": 2,
    "stop": ["x"],
    "max_tokens": 3,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "logit_bias": {"3": 1},
    "stop_token_ids": [4],
    "ignore_eos": True,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **CHOICES,
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "y"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "content": "z", "tool_call_id": "c"},
        ],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"thinking": True},
    },
    "/v1/completions": {**CHOICES, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, "best_of": 2, "suffix": ""},
    "/v1/responses": {
        **SAMPLING,
        "input": [
            {"role": "user", "content": "x"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "z"},
        ],
        "instructions": "i",
        "max_output_tokens": 3,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", **TOOL["function"]}],
        "tool_choice": {"type": "function", "name": "f"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "metadata": {"a": "b"},
    },
    "/tokenize": {"model": NAME, "prompt": "x", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL]},
    "/detokenize": {"model": NAME, "tokens": [1, 2, 3]},
}
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            -1,
            1,
            2.5,
            1e308,
            2**63,
            -(2**64),
            10**40,
            "",
            CANARY,
            "\0",
            "\U0001f600",
            "none",
            "auto",
        ),
        *(
            [],
            [CANARY],
            [None],
            [[]],
            {},
            {CANARY: CANARY},
            {"type": CANARY},
            {"type": "function"},
            [1, CANARY],
            [2**70],
        ),
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a body."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same with something else at a place; ``...`` leaves it out."""
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = changed(copy[key], tuple(rest), new)
    elif new is ...:
        del copy[key]
    else:
        copy[key] = new
    return copy


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A body of which much was left out and a little was changed."""
    whole = BODIES[path]
    body = {name: whole[name] for name in whole if name == "model" or draw(st.booleans())}
    for _ in range(draw(st.integers(0, 2))):
        where = places(body)
        if where:
            body = changed(body, draw(st.sampled_from(where)), draw(VALUES | st.just(...)))
    if "stream_options" in body and draw(st.booleans()):
        body["stream"] = True
    return body


class Books:
    """Meters that are added up. ``answers``: those that had a token; ``answer_tokens``: of all answers."""

    def __init__(self) -> None:
        self.began_ = 0
        self.ended_ = Counter[str]()
        self.tokens = self.first = 0
        self.answers = self.answer_tokens = 0

    def began(self, endpoint: str) -> None:
        self.began_ += 1

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.first += 1

    def token(self, seconds: float) -> None:
        assert seconds >= 0
        self.tokens += 1

    def ended(self, reason: Reason, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        assert prompt_tokens > 0
        assert completion_tokens >= 0
        self.ended_[reason] += 1
        self.answers += completion_tokens > 0
        self.answer_tokens += completion_tokens

    def check(self, *, failed: bool, told: int | None) -> None:
        """What holds once a request is over. ``failed``: an answer did; ``told``: its tokens, where a client was."""
        assert self.began_ == self.ended_.total()
        assert bool(self.ended_["error"]) == failed
        ends = self.ended_["stop"]  # an end token is measured like others, and is none of the answer
        assert self.answers <= self.first <= self.answers + ends
        assert self.answer_tokens <= self.first + self.tokens <= self.answer_tokens + ends
        if told is not None:
            assert self.answer_tokens == told
            assert self.ended_["stop"] + self.ended_["length"] == self.began_


FAILURES: list[tuple[Any, ...]] = [
    ("abc", [104, 105, NumericError(CANARY)]),
    ("abc", QueueFull(CANARY)),
    ("a", ValueError(CANARY)),
]


@pytest.mark.parametrize("path", list(BODIES))
@settings(max_examples=60)
@given(st.data())
def test_no_body_makes_the_server_fail(path: str, data: st.DataObject) -> None:
    body = data.draw(bodies(path))
    failure = data.draw(st.none() | st.sampled_from(FAILURES))
    answers = failure or ("Hello", "x")
    expected = {200, 400, 404} if failure is None else {200, 400, 404, 429, 500}
    books = Books()

    async def test() -> httpx.Response:
        async with client_of(service_of(Script(*answers), metrics=books)) as client:
            return await client.post(path, json=body)

    answer = asyncio.run(test())
    assert answer.status_code in expected, answer.text
    assert answer.headers["x-tsqp-protection"] == "local"
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert CANARY not in answer.text
        assert len(answer.content) <= 4096
    streamed = answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text) if streamed else [answer.json()]
    assert events
    failed = bool(events[-1].get("error"))
    told = None if failed or body.get("max_tokens") == 0 else tokens_told(events[-1])  # 0: one is made and not told
    of_its_own = failed and books.began_ > 0 and failure == FAILURES[0]
    books.check(failed=of_its_own, told=told)


def tokens_told(event: dict[str, Any]) -> int | None:
    """How many tokens the answers have, by the last that a client gets; None where it is not said."""
    usage = event.get("usage") or event.get("response", {}).get("usage") or {}
    return usage.get("completion_tokens", usage.get("output_tokens"))


def test_the_bodies_are_right_before_they_are_changed() -> None:
    """But for what excludes each other."""
    without = {"/v1/chat/completions": "tools", "/v1/responses": "tools", "/tokenize": "messages"}

    async def test() -> None:
        async with client_of(service_of(Script("a"))) as client:
            for path, whole in BODIES.items():
                left_out = {without.get(path), "ignore_eos", "tool_choice" if path in without else None}
                body = {name: value for name, value in whole.items() if name not in left_out}
                answer = await client.post(path, json=body)
                assert answer.status_code == 200, (path, answer.text)

    asyncio.run(test())
