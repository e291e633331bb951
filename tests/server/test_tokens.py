"""Tokens and names: what a client may ask about the model."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.server.chat_model import CONTEXT, IM_END, TEMPLATE
from tests.server.serving import NAME, VOCAB, Script, client_of, service_of
from tsqp.trusted.text.tokenizer import Rendered, Tokenizer


def ask(method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with client_of(service_of(Script("a"))) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(asked())


@pytest.mark.parametrize("text", ["Hello", " é€😀 ", "", "x" * 5000])
def test_a_text_comes_back_from_its_tokens(text: str) -> None:
    answer = ask("POST", "/tokenize", {"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"]) == len(text.encode())
    assert answer["max_model_len"] == CONTEXT
    assert ask("POST", "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_a_conversation_has_the_tokens_of_its_template() -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}]
    with_tools = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    plain = ask("POST", "/tokenize", {"messages": messages}).json()["tokens"]
    assert plain.count(257) == 1
    assert plain[0] == 256
    assert len(ask("POST", "/tokenize", with_tools).json()["tokens"]) > len(plain)


def test_a_text_that_is_longer_than_the_context_has_its_tokens_too() -> None:
    text = "x" * 100_000
    assert ask("POST", "/tokenize", {"prompt": text}).json()["count"] == 100_000
    messages = [{"role": "user", "content": text}]
    assert ask("POST", "/tokenize", {"messages": messages}).json()["count"] > 100_000


@pytest.mark.parametrize(
    ("path", "param"), [("/v1/completions", "prompt"), ("/v1/chat/completions", "messages"), ("/v1/responses", "input")]
)
def test_a_text_that_is_far_too_long_is_refused_before_it_is_tokens(
    path: str, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(*_: object, **__: object) -> list[int]:
        raise AssertionError("the text was made into tokens")

    async def test() -> None:
        text = "word " * 20_000
        given: dict[str, Any] = {"prompt": ["Hi", text], "messages": [{"role": "user", "content": text}], "input": text}
        async with client_of(service_of(Script("a"))) as client:
            monkeypatch.setattr(Rendered, "encode", whole)
            if path == "/v1/completions":
                encode = Tokenizer.encode
                monkeypatch.setattr(
                    Tokenizer, "encode", lambda self, text, **more: (encode if len(text) < 9 else whole)(self, text)
                )
            answer = await client.post(path, json={"model": NAME, param: given[param]})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)

    asyncio.run(test())


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(path: str, body: dict[str, Any], status: int, param: str) -> None:
    answer = ask("POST", path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_models_are_the_names_of_the_one_that_is_served() -> None:
    answer = ask("GET", "/v1/models")
    models = answer.json()["data"]
    assert answer.json()["object"] == "list"
    assert [model["id"] for model in models] == [NAME, "tiny"]
    assert {(model["object"], model["owned_by"], model["max_model_len"]) for model in models} == {
        ("model", "tsqp", CONTEXT)
    }
    by_name = ask("GET", f"/v1/models/{NAME}").json()
    assert by_name == {**models[0], "created": by_name["created"]}  # another server, perhaps a second later
    assert answer.headers["x-tsqp-protection"] == "local"
    missing = ask("GET", "/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_what_a_client_needs_to_make_prompts_itself() -> None:
    """What lm-eval looks for before it takes the server's tokenizer, and not that of a hub."""
    told = ask("GET", "/tokenizer_info").json()
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [told.pop(name) for name in names] == [None, "<|im_end|>", None, None]
    assert told == {"chat_template": TEMPLATE}
    tokens = ask("POST", "/tokenize", {"prompt": "<|im_end|>", "add_special_tokens": False}).json()["tokens"]
    assert tokens == [IM_END]
