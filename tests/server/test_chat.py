"""Chat: what reaches the engine, and what becomes of its answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.chat_model import CONTEXT
from tests.server.serving import NAME, VOCAB, Script, app_of, client_of, events_of, service_of
from tests.trusted.text.vocabularies import VOCABULARIES, cut_at_a_space
from tsqp.server.params import of_choice
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
from tsqp.trusted.text.tokenizer import Tokenizer

URL = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def ask(script: Script, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to bodies, one after the other."""

    async def asked() -> list[httpx.Response]:
        async with client_of(service_of(script)) as client:
            return [await client.post(URL, json={"model": NAME, "messages": USER, **body}) for body in bodies]

    return asyncio.run(asked())


def params_of(**body: Any) -> SamplingParams:
    """What the engine is asked for."""
    script = Script("a")
    (answer,) = ask(script, body)
    assert answer.status_code == 200, answer.text
    return script.opened[0].params


def refused(**body: Any) -> dict[str, Any]:
    """The error of a request that never reaches the engine."""
    script = Script("a")
    (answer,) = ask(script, body)
    assert answer.status_code == 400, answer.text
    assert script.opened == []
    assert len(answer.content) <= 4096
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"]
    return error


def joined(stream: httpx.Response, index: int = 0) -> tuple[str, list[dict[str, Any]], list[Any], str | None]:
    """Text, calls, log-probabilities and the reason of the end of one choice of a stream."""
    text, calls, logprobs, reason = "", list[dict[str, Any]](), list[Any](), None
    for event in events_of(stream.text):
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            assert reason is None, "nothing comes after the end"
            delta = choice["delta"]
            text += delta.get("content") or ""
            logprobs += (choice["logprobs"] or {"content": []})["content"]
            reason = choice["finish_reason"]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(calls)
                    calls.append({"name": call["function"]["name"], "arguments": "", "id": call["id"]})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return text, calls, logprobs, reason


def test_an_answer_has_the_shape_of_the_api() -> None:
    script = Script("Hello")
    (answer,) = ask(script, {"max_tokens": 5})
    body = answer.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 0
    prompt = len(script.opened[0].prompt)
    assert body == {
        "object": "chat.completion",
        "model": NAME,
        "system_fingerprint": "tsqp-local-0123456789ab",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "finish_reason": "length",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5},
    }
    assert answer.headers["x-tsqp-protection"] == "local"


def test_a_stream_has_the_order_of_the_api() -> None:
    script = Script("Hi")
    with_usage, without = ask(
        script, {"stream": True, "stream_options": {"include_usage": True}}, {"stream": True, "n": 2}
    )
    events = events_of(with_usage.text)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "H"}, {"content": "i"}, {}]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "stop"]
    assert [event["usage"] is None for event in events] == [True, True, True, True, False]
    prompt = len(script.opened[0].prompt)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2}
    for stream in (with_usage, without):
        told = events_of(stream.text)
        assert len({(event["id"], event["created"], event["system_fingerprint"]) for event in told}) == 1
        assert {event["object"] for event in told} == {"chat.completion.chunk"}
    assert all("usage" not in event for event in events_of(without.text))
    assert [joined(without, index)[0] for index in (0, 1)] == ["Hi", "Hi"]


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, VOCAB - 1), max_size=20),
    st.lists(st.text(max_size=3, min_size=1), max_size=4),
    st.integers(1, 22),
    st.booleans(),
)
def test_a_stream_joined_is_the_whole_answer(tokens: list[int], stops: list[str], most: int, logprobs: bool) -> None:
    """Also where a character is cut, and where the end may be the beginning of a stop string."""
    text = Script().tokenizer.decode(tokens)
    stop = [*stops[:3], text[5:8]] if text[5:8] else stops
    body = {"stop": stop, "max_tokens": most, "logprobs": logprobs}
    whole, stream = ask(Script(tokens), body, {**body, "stream": True, "stream_options": {"include_usage": True}})
    (choice,) = whole.json()["choices"]
    assert joined(stream)[0] == choice["message"]["content"]
    assert joined(stream)[2] == (choice["logprobs"]["content"] if logprobs else [])
    assert joined(stream)[3] == choice["finish_reason"]
    assert [event["usage"] for event in events_of(stream.text) if event["usage"]] == [whole.json()["usage"]]
    assert all(one not in choice["message"]["content"] for one in stop)


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
@pytest.mark.parametrize("begins", [True, False])
def test_no_space_is_lost_in_any_vocabulary(name: str, begins: bool) -> None:
    """A prompt of control tokens alone is no text yet, so the answer begins one, as the library decodes it."""
    format_ = VOCABULARIES[name]
    tokenizer = Tokenizer(format_)
    control = tokenizer.encode("</s>", special_tokens=False)
    prompt = control if begins else tokenizer.encode("ab", special_tokens=False)
    tokens = tokenizer.encode("a b  cd", special_tokens=False) + tokenizer.encode(" e", special_tokens=False)
    script = Script(tokens, text_format=format_)
    script.llm.config.vocab_size = 1000

    async def asked() -> list[httpx.Response]:
        body = {"model": NAME, "prompt": prompt}
        async with client_of(service_of(script)) as client:
            return [await client.post("/v1/completions", json={**body, "stream": one}) for one in (False, True)]

    whole, stream = asyncio.run(asked())
    expected = tokenizer.decode([*prompt, *tokens])
    expected = expected if begins else expected.removeprefix("ab")
    assert whole.json()["choices"][0]["text"] == expected
    assert "".join(event["choices"][0]["text"] for event in events_of(stream.text)) == expected


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_an_answer_to_a_conversation_is_a_text_of_its_own(name: str, path: str) -> None:
    """Its first token has no space in vocabularies that leave it out, whatever text the prompt ends with."""
    format_ = replace(VOCABULARIES[name], chat_template="{{ messages[0].content }}")
    tokenizer = Tokenizer(format_)
    _, tokens = cut_at_a_space(tokenizer)
    script = Script(tokens, text_format=format_)
    said = {"input": "ab"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "ab"}]}
    more = {"include": ["message.output_text.logprobs"]} if path == "/v1/responses" else {"logprobs": True}

    async def asked() -> httpx.Response:
        async with client_of(service_of(script)) as client:
            return await client.post(path, json={"model": NAME, **said, **more})

    answer = asyncio.run(asked()).json()
    if path == "/v1/responses":
        (part,) = answer["output"][0]["content"]
        text, entries = part["text"], part["logprobs"]
    else:
        (choice,) = answer["choices"]
        text, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert text == tokenizer.decode(tokens)
    assert "".join(entry["token"] for entry in entries) == text


def test_each_parameter_reaches_the_engine() -> None:
    given_ = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": -5,
        "frequency_penalty": 1.5,
        "presence_penalty": -1.5,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "max_tokens": 7,
    }
    params = params_of(**given_, stop="x", logit_bias={"3": 4}, logprobs=True, top_logprobs=2)
    expected = {**given_, "stop_token_ids": (3,), "stop": ("x",), "logit_bias": {3: 4.0}, "logprobs": 2}
    assert {name: getattr(params, name) for name in expected} == expected


def test_what_is_not_said_is_as_the_api_has_it() -> None:
    params = params_of()
    assert (params.temperature, params.top_p, params.seed, params.logprobs) == (1.0, 1.0, None, None)
    assert params_of(top_k=-1).top_k == 0
    assert params_of(logprobs=True).logprobs == 0
    assert params_of(max_tokens=9, max_completion_tokens=8).max_tokens == 8
    assert params_of(stop=["a", "b"]).stop == ("a", "b")
    assert len(params_of(stop=["x"] * 64).stop) == 64  # lm-eval's tasks have more than the four of the API


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": []}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}, {"role": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"chat_template_kwargs": {"canary": 1}}, "chat_template_kwargs"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    error = refused(**body)
    assert error["param"] == param
    assert "canary" not in json.dumps(error)


def test_numbers_that_are_none_are_refused() -> None:
    async def test() -> None:
        async with client_of(service_of(Script("a"))) as client:
            for number in ("NaN", "Infinity", "-Infinity", "1e999"):
                text = json.dumps({"model": NAME, "messages": USER})[:-1] + f', "temperature": {number}}}'
                answer = await client.post(URL, content=text, headers={"content-type": "application/json"})
                assert answer.status_code == 400

    asyncio.run(test())


def test_another_model_is_not_found() -> None:
    (answer, other) = ask(Script("a"), {"model": "canary"}, {"model": "tiny"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "canary" not in answer.text
    assert other.json()["model"] == NAME


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_longer_than_the_context_is_refused(stream: bool) -> None:
    long = [{"role": "user", "content": "canary" * 400}]
    for body in ({"messages": long}, {"messages": USER, "max_tokens": CONTEXT}):
        error = refused(**body, stream=stream)
        assert error["code"] == "context_length_exceeded"
        assert "this model's maximum context length is 2048 tokens" in error["message"]  # litellm looks for these words
        assert "canary" not in error["message"]
    assert params_of(max_tokens=CONTEXT - 100).max_tokens == CONTEXT - 100


def test_choices_have_seeds_of_their_own_and_the_first_that_which_was_given() -> None:
    script = Script("a")
    ask(script, {"n": 3, "seed": 7}, {"seed": 7}, {"n": 3})
    seeds = [one.params.seed for one in script.opened]
    assert seeds[0] == seeds[3] == 7
    assert len(set(seeds[:3])) == 3
    assert seeds[4:] == [None, None, None]
    assert [of_choice(SamplingParams(seed=7), index).seed for index in range(3)] == seeds[:3]


def test_the_tenant_and_the_salt_are_the_scope() -> None:
    script = Script("a")

    async def asked() -> None:
        app = app_of(service_of(script))

        async def with_tenant(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = {"tenant": "a key"}
            await app(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=with_tenant), base_url="http://x") as client:
            for salt in (None, "mine"):
                await client.post(URL, json={"model": NAME, "messages": USER, "cache_salt": salt})

    asyncio.run(asked())
    ask(script, {})
    assert [(one.tenant, one.salt) for one in script.opened] == [("a key", ""), ("a key", "mine"), ("", "")]


ROLES: list[tuple[list[dict[str, Any]], str]] = [
    ([{"role": "system", "content": "S"}], "<|im_start|>system\nS<|im_end|>\n"),
    (
        [{"role": "developer", "content": "D"}, *USER],
        "<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    (
        [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, *USER],
        "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "<|im_start|>user\na\nb<|im_end|>\n",
    ),
    (
        [
            *USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ],
        '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"a": 1}}'
        "</tool_call><|im_end|>\n<|im_start|>tool\nsunny<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(("messages", "text"), ROLES)
def test_the_template_sees_the_conversation(messages: list[dict[str, Any]], text: str) -> None:
    script = Script("a")
    (answer,) = ask(script, {"messages": messages})
    assert answer.status_code == 200
    assert script.opened[0].prompt == script.tokenizer.encode(text + "<|im_start|>assistant\n")


def test_what_looks_like_a_control_token_is_text() -> None:
    script = Script("a")
    ask(script, {"messages": [{"role": "user", "content": "<|im_end|>"}]})
    assert script.opened[0].prompt.count(257) == 1


def test_the_template_may_refuse_in_its_own_words() -> None:
    error = refused(messages=[*USER, {"role": "system", "content": "canary"}])
    assert "a system message comes first" in error["message"]
    assert "canary" not in error["message"]


def test_arguments_reach_the_template() -> None:
    script = Script("a")
    ask(script, {"chat_template_kwargs": {"thinking": True}})
    assert script.tokenizer.decode(script.opened[0].prompt).endswith("<think>")


def test_forms_reach_the_engine() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    assert params_of(response_format={"type": "text"}).structured_outputs is None
    params = params_of(response_format={"type": "json_object"})
    assert params.structured_outputs == StructuredOutputsParams(json_object=True)
    params = params_of(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert params.structured_outputs == StructuredOutputsParams(json=schema)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_calls(stream: bool) -> None:
    script = Script(f"Let me look.\n{CALL}\n{CALL}")
    (answer,) = ask(script, {"tools": [TOOL], "stream": stream})
    assert script.opened[0].params.structured_outputs is None
    assert '"name": "weather"' in script.tokenizer.decode(script.opened[0].prompt)
    if stream:
        text, calls, _, reason = joined(answer)
    else:
        (choice,) = answer.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        assert {call["type"] for call in choice["message"]["tool_calls"]} == {"function"}
        calls = [{"id": call["id"], **call["function"]} for call in choice["message"]["tool_calls"]]
    assert (text, reason) == ("Let me look.", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", '{"city": "Oslo"}')] * 2
    assert len({call["id"] for call in calls}) == 2


def test_an_answer_that_is_nothing_but_a_call_has_no_content() -> None:
    (answer,) = ask(Script(CALL), {"tools": [TOOL]})
    assert answer.json()["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_not_repaired(stream: bool) -> None:
    (answer,) = ask(Script(CALL), {"tools": [TOOL], "max_tokens": len(CALL) - 18, "stream": stream})
    if stream:
        _, calls, _, reason = joined(answer)
    else:
        (choice,) = answer.json()["choices"]
        calls, reason = [call["function"] for call in choice["message"]["tool_calls"]], choice["finish_reason"]
    assert reason == "length"
    assert calls[0]["arguments"] == '{"city": "Os'


def test_one_call_at_most_where_several_are_not_wanted() -> None:
    script = Script(f"a{CALL}b{CALL}c")
    for stream in (False, True):
        (answer,) = ask(script, {"tools": [TOOL], "parallel_tool_calls": False, "stream": stream})
        if stream:
            text, calls, _, _ = joined(answer)
        else:
            message = answer.json()["choices"][0]["message"]
            text, calls = message["content"], [call["function"] for call in message["tool_calls"]]
        assert text == "a"
        assert [call["arguments"] for call in calls] == ['{"city": "Oslo"}']


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("more", "other"), [(0, "length"), (1, "length"), (500, "stop")])
def test_an_answer_of_one_call_ends_with_it(stream: bool, more: int, other: str) -> None:
    """With the object of the call, though the bound of tokens may lie there; another choice ends as it would have."""
    call = CALL.partition("\n</tool_call>")[0]
    body = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": len(call) + more, "n": 2, "stream": stream}
    (answer,) = ask(
        Script(f"{CALL}b" * 9, "a" * 99), {**body, **({"stream_options": {"include_usage": True}} if stream else {})}
    )
    *told, last = events_of(answer.text) if stream else [answer.json()] * 2
    choices = [choice for event in told for choice in event["choices"] if choice["finish_reason"]]
    assert {choice["index"]: choice["finish_reason"] for choice in choices} == {0: "tool_calls", 1: other}
    assert last["usage"]["completion_tokens"] == len(call) + min(len(call) + more, 99)


def test_no_call_comes_where_none_is_wanted() -> None:
    script = Script(CALL)
    (answer,) = ask(script, {"tools": [TOOL], "tool_choice": "none"})
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert "weather" not in script.tokenizer.decode(script.opened[0].prompt)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "weather"}}, "stop")],
)
def test_a_call_that_has_to_come_is_a_form(choice: Any, reason: str) -> None:
    script = Script(CALL)
    (answer,) = ask(script, {"tools": [TOOL], "tool_choice": choice})
    form = script.opened[0].params.structured_outputs
    assert form is not None
    assert form.kind == "grammar"
    assert answer.json()["choices"][0]["finish_reason"] == reason


def test_the_form_of_a_call_allows_the_calls_and_nothing_else() -> None:
    other = {"type": "function", "function": {"name": "time"}}
    form = params_of(tools=[TOOL, other], tool_choice="required").structured_outputs
    assert form is not None
    tokenizer = Script().tokenizer
    grammar = tokenizer.grammar(form, VOCAB)

    def allowed(text: str) -> bool:
        matcher = grammar.matcher()
        for token in tokenizer.encode(text, special_tokens=False):
            if not matcher.allowed()[token]:
                return False
            matcher.accept(token)
        return matcher.complete

    tight = '<tool_call>\n{"name": "weather", "arguments": {"city":"Oslo"}}\n</tool_call>'
    timed = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert allowed(tight)
    assert allowed(f"{timed}\n{tight}")
    assert not allowed("Hello")
    assert not allowed(timed.replace("{}", '{"a":1}'))
    assert not allowed(tight.replace("weather", "whether"))


def test_a_schema_of_a_tool_that_is_none_is_refused_by_name() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": 3, "canary": 1}}}

    async def test() -> None:
        script = Script("a")
        open_ = script.open

        async def opening(prompt: Any, params: SamplingParams, **options: Any) -> Any:
            if params.structured_outputs is not None:
                script.tokenizer.grammar(params.structured_outputs, VOCAB)
            return await open_(prompt, params, **options)

        script.open = opening  # type: ignore[method-assign]
        async with client_of(service_of(script)) as client:
            body = {"model": NAME, "messages": USER, "tools": [bad], "tool_choice": "required"}
            answer = await client.post(URL, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert "canary" not in answer.text

    asyncio.run(test())


def test_tools_need_a_template_that_reads_them() -> None:
    async def test(tools: bool) -> httpx.Response:
        script = Script("a", text_format=VOCABULARIES["byte-level"])
        async with client_of(service_of(script)) as client:
            body = {"model": NAME, "messages": USER, **({"tools": [TOOL]} if tools else {})}
            return await client.post(URL, json=body)

    for tools, param in ((True, "tools"), (False, "messages")):
        answer = asyncio.run(test(tools))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
