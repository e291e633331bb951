"""The value that keeps a conversation at one server: the client's or random, and of no use here."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.asgi import ask, echo
from tsqp.server.errors import ApiError
from tsqp.server.guards.affinity import HEADER, PATHS, Affinity
from tsqp.server.guards.faults import Faults

APP = Affinity(echo)
CHAT = "/v1/chat/completions"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"


def shown(values: Sequence[str] = (), path: str = CHAT) -> str | None:
    """The value in the answer to a request with these."""
    answer = ask(APP, path, method="POST", headers=[(HEADER, value) for value in values])
    found = answer.headers.get_list(HEADER)
    assert len(found) <= 1
    return found[0] if found else None


@given(st.text(LETTERS, min_size=1, max_size=64))
def test_a_value_of_the_client_comes_back(value: str) -> None:
    assert shown([value]) == value


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        ["a" * 65],
        ["a b"],
        ["a\tb"],
        ["a,b"],
        ["a=b"],
        ["<b>"],
        ["a/b"],
        ["x" * 10_000],
        ["a", "a"],
        ["a", "b"],
    ],
    ids=lambda values: ";".join(values)[:8],
)
def test_what_is_missing_malformed_or_there_twice_gives_a_fresh_one(values: list[str]) -> None:
    found = {shown(values) for _ in range(3)}
    assert len(found) == 3
    assert all(value is not None and re.fullmatch("[0-9a-f]{32}", value) for value in found)


def test_only_answers_that_keep_a_prefix_have_one() -> None:
    assert {path for path in (*PATHS, "/tokenize", "/v1/models", "/readyz") if shown(["a"], path)} == PATHS


def test_the_value_in_an_answer_is_not_the_endpoints() -> None:
    """An endpoint that named one would tell something of the text."""

    async def names_one(scope, receive, send):  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 200, "headers": [(HEADER.encode(), b"of-the-text")]})
        await send({"type": "http.response.body"})

    assert ask(Affinity(names_one), CHAT, headers={HEADER: "mine"}).headers.get_list(HEADER) == ["mine"]


def test_a_refusal_has_none() -> None:
    async def refuses(scope, receive, send):  # type: ignore[no-untyped-def]
        raise ApiError(404, "no such model")

    answer = ask(Faults(Affinity(refuses)), CHAT, headers={HEADER: "mine"})
    assert answer.status_code == 404
    assert HEADER not in answer.headers
