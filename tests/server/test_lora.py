"""Adapters are models of their own to clients: ``MODEL:NAME`` in requests, in answers and in the list of models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapters import merged, write_adapter
from tests.families import byte_tokenizer, random_tokens, tiny_model
from tests.server.serving import NAME, Script, client_of, service_of
from tsqp import LLM, AsyncLLM, ComputeConfig
from tsqp.server.ready import fingerprint_of

ADAPTERS = ("books", "law")
GREEDY = {"temperature": 0.0, "ignore_eos": True}
USER = [{"role": "user", "content": "hello"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
}


def ask(script: Script, *asked: tuple[str, str, dict[str, Any] | None], **changes: Any) -> list[httpx.Response]:
    """Answers to requests, each (method, path, body), of a server with two adapters."""

    async def test() -> list[httpx.Response]:
        async with client_of(service_of(script, adapters=ADAPTERS, **changes)) as client:
            return [await client.request(method, path, json=body) for method, path, body in asked]

    return asyncio.run(test())


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", [NAME, "tiny"])
@pytest.mark.parametrize("lora", [None, *ADAPTERS])
def test_the_name_chooses_the_adapter(path: str, name: str, lora: str | None) -> None:
    script = Script("a")
    model = name if lora is None else f"{name}:{lora}"
    (answer,) = ask(script, ("POST", path, {"model": model, **ENDPOINTS[path]}))
    assert answer.status_code == 200
    assert [one.lora for one in script.opened] == [lora]
    assert answer.json()["model"] == (NAME if lora is None else f"{NAME}:{lora}")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_streams_have_the_name_of_the_adapter(path: str) -> None:
    script = Script("a")
    (answer,) = ask(script, ("POST", path, {"model": f"{NAME}:law", "stream": True, **ENDPOINTS[path]}))
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    models = [event.get("model") or event.get("response", {}).get("model") for event in map(json.loads, events)]
    assert set(models) - {None} == {f"{NAME}:law"}
    assert script.opened[0].lora == "law"


def test_every_choice_has_the_adapter() -> None:
    script = Script("a")
    ask(script, ("POST", "/v1/completions", {"model": "tiny:law", "prompt": ["a", "b"], "n": 2}))
    assert [one.lora for one in script.opened] == ["law"] * 4


@pytest.mark.parametrize("model", [f"{NAME}:none", f"{NAME}:", ":books", "books", f"{NAME}:books:law", "canary:books"])
def test_another_name_is_a_404_with_those_there_are(model: str) -> None:
    script = Script("a")
    for path, body in ENDPOINTS.items():
        (answer,) = ask(script, ("POST", path, {"model": model, **body}))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"({NAME}, tiny, {NAME}:books, {NAME}:law, tiny:books, tiny:law)" in error["message"]
        assert "canary" not in answer.text
    assert not script.opened


def test_many_names_are_not_all_in_an_error() -> None:
    answer, more = ask(Script("a"), ("GET", "/v1/models/x", None), ("GET", "/v1/models", None), names=("a", "b", "c"))
    assert "(a, b, c, a:books, a:law, b:books, b:law, c:books, …)" in answer.json()["error"]["message"]
    assert len(more.json()["data"]) == 9


def test_the_list_of_models_has_adapters_and_their_parents() -> None:
    listed, one, plain = ask(
        Script("a"),
        ("GET", "/v1/models", None),
        ("GET", f"/v1/models/{NAME}:law", None),
        ("GET", f"/v1/models/{NAME}", None),
    )
    parents = {model["id"]: model["parent"] for model in listed.json()["data"]}
    assert parents == {NAME: None, "tiny": None} | {f"{name}:{a}": name for name in (NAME, "tiny") for a in ADAPTERS}
    assert (one.json()["id"], one.json()["parent"]) == (f"{NAME}:law", NAME)
    assert plain.json()["parent"] is None


def test_tokens_are_those_of_the_model() -> None:
    plain, own, missing = ask(
        Script("a"),
        *(("POST", "/tokenize", {"model": model, "prompt": "hello"}) for model in (NAME, f"{NAME}:law", f"{NAME}:x")),
    )
    assert plain.json() == own.json()
    assert missing.status_code == 404


def test_answers_at_once_are_each_by_their_adapter(tmp_path: Path) -> None:
    """A real model: each answer is that of the merged weights."""
    model = tiny_model("llama")
    paths = {name: write_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate(ADAPTERS)}
    oracles = {"m": model, **{f"m:{name}": merged(model, path) for name, path in paths.items()}}
    prompts = [random_tokens(6 + number, seed=number) for number in range(6)]
    compute = ComputeConfig(dtype="float32", lora=tuple(map(str, paths.values())))

    names = [*oracles, *oracles]

    async def answers() -> list[str]:
        llm = AsyncLLM(LLM(str(model.directory), protection="local", compute=compute))
        async with llm, client_of(service_of(llm, names=("m",), adapters=ADAPTERS)) as client:
            asked = [
                client.post("/v1/completions", json={"model": name, "prompt": prompt, "max_tokens": 6, **GREEDY})
                for prompt, name in zip(prompts, names, strict=True)
            ]
            return [reply.json()["choices"][0]["text"] for reply in await asyncio.gather(*asked)]

    expected = [oracles[name].greedy(prompt, 6) for prompt, name in zip(prompts, names, strict=True)]
    assert asyncio.run(answers()) == [byte_tokenizer().decode(tokens) for tokens in expected]


def test_the_fingerprint_says_which_adapters_there_are(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = set()
    for lora in ((), (f"a={write_adapter(tmp_path / 'x', model)}",), (f"b={tmp_path / 'x'}",)):
        with LLM(str(model.directory), protection="local", compute=ComputeConfig(lora=lora)) as llm:
            found.add(fingerprint_of(llm))
    assert len(found) == 3
