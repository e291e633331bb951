"""Headers of every answer, and ids that a client cannot choose for us."""

from __future__ import annotations

import re

import pytest
from starlette.types import Receive, Scope, Send

from tests.server.asgi import ask, echo
from tsqp.server.errors import ApiError
from tsqp.server.guards.faults import Faults
from tsqp.server.guards.headers import AnswerHeaders

APP = AnswerHeaders(echo, {"x-tsqp-protection": "masked"})


def test_every_answer_has_the_security_headers_and_the_protection() -> None:
    headers = ask(APP).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-tsqp-protection"] == "masked"


def test_an_endpoint_may_say_otherwise() -> None:
    async def cached(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"max-age=60")]})
        await send({"type": "http.response.body"})

    assert ask(AnswerHeaders(cached, {})).headers.get_list("cache-control") == ["max-age=60"]


def test_two_requests_with_one_id_have_two_of_ours() -> None:
    answers = [ask(APP, headers={"x-request-id": "same"}) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["same", "same"]
    ours = {answer.headers["x-tsqp-request-id"] for answer in answers}
    assert len(ours) == 2
    assert all(re.fullmatch("req_[0-9a-f]{32}", one) for one in ours)
    assert ours == {answer.headers["x-request_id"] for answer in answers}  # what is used inside


@pytest.mark.parametrize("theirs", ["", "a" * 65, "a b", "a\tb", "é", "x" * 1_000_000, "<script>"], ids=lambda t: t[:8])
def test_an_id_that_is_long_or_unclean_is_not_repeated(theirs: str) -> None:
    answer = ask(APP, headers=[("x-request-id", theirs)] if theirs.isascii() else {})
    assert answer.headers["x-request-id"] == answer.headers["x-tsqp-request-id"]


def test_the_longest_clean_id_is_repeated() -> None:
    theirs = "aZ09._-" + "b" * 57
    assert ask(APP, headers={"x-request-id": theirs}).headers["x-request-id"] == theirs


def test_each_status_is_told() -> None:
    told: list[int] = []
    ask(AnswerHeaders(Faults(refuses), {}, told.append))
    ask(AnswerHeaders(echo, {}, told.append))
    assert told == [404, 200]


async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, "not here")
