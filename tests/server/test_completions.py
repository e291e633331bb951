"""Completions: prompts of every kind, echo, and log-probabilities."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.server.chat_model import CONTEXT
from tests.server.serving import NAME, VOCAB, Script, client_of, events_of, service_of
from tests.trusted.text.vocabularies import VOCABULARIES, cut_at_a_space
from tsqp.trusted.text.tokenizer import Tokenizer

URL = "/v1/completions"


def ask(script: Script, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to bodies, one after the other."""

    async def asked() -> list[httpx.Response]:
        async with client_of(service_of(script)) as client:
            return [await client.post(URL, json={"model": NAME, "prompt": "Hi", **body}) for body in bodies]

    return asyncio.run(asked())


def test_an_answer_has_the_shape_of_the_api() -> None:
    (answer,) = ask(Script("Hello"), {})
    body = answer.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 0
    assert body == {
        "object": "text_completion",
        "model": NAME,
        "system_fingerprint": "tsqp-local-0123456789ab",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7},
    }


def test_a_stream_has_the_same_text_and_usage() -> None:
    body = {"stream": True, "stream_options": {"include_usage": True}}
    (answer,) = ask(Script("Hello"), body)
    events = events_of(answer.text)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "Hello"
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]].count("stop") == 1
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("Hi", [[39, 72]]),
        (["Hi", "H"], [[39, 72], [39]]),
        ([5, 319], [[5, 319]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ("<|im_end|>", [[257]]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, tokens: list[list[int]]) -> None:
    script = Script("a", "b", "c", "d")
    (answer,) = ask(script, {"prompt": prompt, "n": 2, "seed": 3})
    assert [one.prompt for one in script.opened] == [one for one in tokens for _ in range(2)]
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(2 * len(tokens)))
    assert [choice["text"] for choice in answer.json()["choices"]] == list("abcd")[: 2 * len(tokens)]
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, tokens))
    seeds = [one.params.seed for one in script.opened]
    assert seeds[:2] * len(tokens) == seeds  # each prompt is answered as it would be alone
    assert seeds[0] == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [VOCAB]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 129}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": CONTEXT - 1}, "max_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    script = Script("a")
    (answer,) = ask(script, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert script.opened == []


def test_the_default_length_is_that_of_the_api() -> None:
    script = Script("a")
    ask(script, {}, {"prompt": [1] * (CONTEXT - 3)}, {"best_of": 1})
    assert [one.params.max_tokens for one in script.opened] == [16, 3, 16]
    assert all(one.salt == "" for one in script.opened)


@pytest.mark.parametrize(("logprobs", "likeliest"), [(0, 0), (5, 5)])
def test_log_probabilities_have_the_token_that_was_chosen(logprobs: int, likeliest: int) -> None:
    (answer,) = ask(Script("Hi"), {"logprobs": logprobs})
    told = answer.json()["choices"][0]["logprobs"]
    assert [one[token] for one, token in zip(told["top_logprobs"], "Hi", strict=True)] == told["token_logprobs"]
    assert {len(one) for one in told["top_logprobs"]} == {likeliest + 1}


@pytest.mark.parametrize(("prompt", "echoed"), [("Hi", "Hi"), ([39, 72], "Hi"), ("<|im_end|>x", "<|im_end|>x")])
def test_the_prompt_may_be_told_again(prompt: Any, echoed: str) -> None:
    whole, stream = ask(
        Script("abc"), {"prompt": prompt, "echo": True}, {"prompt": prompt, "echo": True, "stream": True}
    )
    assert whole.json()["choices"][0]["text"] == f"{echoed}abc"
    assert "".join(event["choices"][0]["text"] for event in events_of(stream.text)) == f"{echoed}abc"


def test_no_token_may_be_asked_for_where_the_prompt_is_told_again() -> None:
    whole, stream = ask(Script("abc"), *({"echo": True, "max_tokens": 0, "stream": one} for one in (False, True)))
    (choice,) = whole.json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert whole.json()["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    (event,) = events_of(stream.text)
    assert event["choices"] == [choice]


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_answer_goes_on_with_the_text_of_its_prompt(name: str, as_ids: bool) -> None:
    """With the space between them, also in vocabularies that leave out the first one of a text."""
    tokenizer = Tokenizer(VOCABULARIES[name])
    before, tokens = cut_at_a_space(tokenizer)
    script = Script(tokens, text_format=VOCABULARIES[name])
    script.llm.config.vocab_size = 1000
    asked = {"prompt": before if as_ids else "ab", "max_tokens": len(tokens)}
    answers = ask(
        script, asked, {**asked, "stream": True}, {**asked, "stop": [" "]}, {**asked, "echo": True, "logprobs": 1}
    )
    plain, stopped, echoed = (answers[place].json()["choices"][0] for place in (0, 2, 3))
    assert plain["text"] == " c"
    assert "".join(event["choices"][0]["text"] for event in events_of(answers[1].text)) == " c"
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    assert echoed["text"] == "ab c"
    told = echoed["logprobs"]
    assert "".join(told["tokens"]) == " c"  # the script has no log-probabilities of the prompt
    assert told["text_offset"] == [2, 3][: len(tokens)]
