"""The document says what is there, and its ranges are those that hold."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.serving import NAME, Script, client_of, service_of
from tsqp.server.api_keys import KeyFile, add_line, line_for, new_key
from tsqp.server.app import create_app
from tsqp.server.openapi import document
from tsqp.server.routes import OPERATIONS, routes

DOCUMENT = document(OPERATIONS)
SCHEMAS = DOCUMENT["components"]["schemas"]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": NAME, "prompt": "Hi"},
    "/v1/responses": {"model": NAME, "input": "Hi"},
}
BESIDE: dict[str, dict[str, Any]] = {  # what a field needs to play a part
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
    "max_tokens": {"echo": True},
}


def ask(method: str, path: str, body: Any = None) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with client_of(service_of(Script("a"))) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(asked())


def test_each_path_is_in_it_and_it_is_shown() -> None:
    shown = ask("GET", "/openapi.json")
    assert shown.json() == DOCUMENT
    served = {
        (method, re.sub(r":\w+", "", route.path))
        for route in routes(service_of(Script()))
        for method in route.methods or ()
    }
    told = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert {(method, path) for method, path in served if method != "HEAD"} == told | {("GET", "/openapi.json")}


def test_it_says_what_needs_a_key(tmp_path: Path) -> None:
    """As a client that reads it will do; a key is asked for before anything else of a request is looked at."""
    add_line(tmp_path / "keys", line_for("somebody", new_key()))
    keys = KeyFile(tmp_path / "keys")

    async def statuses() -> dict[tuple[str, str], int]:
        transport = httpx.ASGITransport(create_app(service_of(Script("a")), keys=keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return {
                (method, path): (await client.request(method, path)).status_code
                for path, item in DOCUMENT["paths"].items()
                for method in item
            }

    told = {(m, path): one.get("security") for path, item in DOCUMENT["paths"].items() for m, one in item.items()}
    assert {place for place, status in asyncio.run(statuses()).items() if status != 401} == {
        place for place, security in told.items() if security == []
    }
    assert told["get", "/v1/attestation"] == []


def test_its_references_lead_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    references = set(re.findall(r'"\$ref": "#/components/(\w+)/([^"]+)"', text))
    assert len(references) > 30
    for kind, name in references:
        assert name in DOCUMENT["components"][kind]


def fields(path: str) -> dict[str, Any]:
    """The schemas of a body's fields."""
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    found: dict[str, Any] = SCHEMAS[content["schema"]["$ref"].rpartition("/")[2]]["properties"]
    return found


def bounds(path: str) -> Iterator[tuple[str, Any, bool]]:
    """Values at the bounds of fields, and just beyond them, with whether they are allowed."""
    for name, schema in fields(path).items():
        for one in schema.get("anyOf", [schema]):
            step = 1 if one.get("type") == "integer" else 1e-6
            for keyword, sign in (("minimum", 1), ("maximum", -1)):
                if keyword in one:
                    yield name, one[keyword], True
                    yield name, one[keyword] - sign * step, False
                if (exclusive := f"exclusive{keyword.capitalize()}") in one:
                    yield name, one[exclusive], False
                    yield name, one[exclusive] + sign * step, True
            if "maxLength" in one:
                yield name, "x" * one["maxLength"], True
                yield name, "x" * (one["maxLength"] + 1), False
            if "minLength" in one:
                yield name, "x" * (one["minLength"] - 1), False
            if "maxItems" in one and name == "stop":
                yield name, ["x"] * one["maxItems"], True
                yield name, ["x"] * (one["maxItems"] + 1), False
            if "minItems" in one:
                yield name, [], False


@pytest.mark.parametrize(
    ("path", "name", "value", "allowed"), [(path, *bound) for path in BODIES for bound in bounds(path)]
)
def test_its_ranges_are_those_that_hold(path: str, name: str, value: Any, allowed: bool) -> None:
    beside = BESIDE.get(name, {})
    body = {**BODIES[path], **{key: one for key, one in beside.items() if key in fields(path)}, name: value}
    answer = ask("POST", path, body)
    assert (answer.status_code == 200) == allowed, answer.text
    if not allowed:
        assert (answer.json()["error"]["param"] or "").partition("[")[0] == name


@pytest.mark.parametrize("path", BODIES)
def test_no_range_is_left_out(path: str) -> None:
    """Each number of a body has bounds in it, but for those whose bound is another field, or the model."""
    numbers = {
        name
        for name, schema in fields(path).items()
        for one in schema.get("anyOf", [schema])
        if one.get("type") in ("number", "integer") and not {"minimum", "exclusiveMinimum"} & one.keys()
    }
    assert numbers <= {"best_of"}


@pytest.mark.parametrize("said", [{}, {"type": None}, {"type": "message"}])
def test_an_item_of_an_input_may_lack_its_type(said: dict[str, Any]) -> None:
    """Then it is a message: the server takes it, and the document says so."""
    message = SCHEMAS["InputMessage"]
    item = {"role": "user", "content": "Hi", **said}
    assert ask("POST", "/v1/responses", {"model": NAME, "input": [item]}).status_code == 200
    assert set(message["required"]) <= item.keys()
    assert item.get("type") in message["properties"]["type"]["enum"]
    for other in ("InputCall", "InputCallOutput"):
        assert "type" in SCHEMAS[other]["required"]
