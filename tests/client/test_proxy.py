"""A proxy under attack: requests pass to a verified server as they are, and to any other nothing leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.evidence_server import honest
from tests.client.upstream import EVENTS, HEAD, Upstream, filled, settled
from tests.tee.certificates import key_pair
from tests.tee.policies import policy
from tsqp.client.address import parse_server
from tsqp.client.pinning import SPARE_S, PinnedServer
from tsqp.client.proxy import HEAD_BYTES, Proxy
from tsqp.tee.collateral import Without

FIRST, SECOND = key_pair(), key_pair()
BODY = b'{"messages": [{"role": "user", "content": "a secret"}]}'


class Side:
    """A client's side of a proxy before ``upstream``."""

    def __init__(self, upstream: Upstream, pinned: PinnedServer, port: int, clock: list[float]) -> None:
        self.upstream = upstream
        self.pinned = pinned
        self.port = port
        self.clock = clock

    async def ask(self, data: bytes) -> bytes:
        """All of an answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        return answer

    def post(self, body: bytes = BODY, host: str | None = None, more: bytes = b"") -> bytes:
        name = (host or f"127.0.0.1:{self.port}").encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: %b\r\nAuthorization: Bearer key\r\n" % name
        return head + b"content-length: %d\r\n" % len(body) + more + b"\r\n" + body

    async def refused(self, code: str, status: int = 502) -> str:
        """The message of an error, while the server got nothing."""
        answer = await self.ask(self.post())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        error = json.loads(body)["error"]
        assert error["code"] == code
        assert self.upstream.requests == []
        return str(error["message"])


Case = Callable[[Side], Awaitable[None]]


def run(case: Case, directory: Path) -> None:
    async def whole() -> None:
        upstream, clock = Upstream(FIRST, directory), [1000.0]
        async with upstream.running() as address:
            pinned = PinnedServer(
                parse_server(address), policy(["none"]), Without(), max_age_s=100.0, clock=lambda: clock[0]
            )
            listening = await Proxy(pinned).listen(0)
            try:
                await case(Side(upstream, pinned, listening.sockets[0].getsockname()[1], clock))
            finally:
                listening.close()
                pinned.close()
        await settled()

    asyncio.run(whole())


def test_a_request_passes_as_it_is_under_the_servers_name(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        answer = await side.ask(side.post(more=b"X-Own: kept\r\nConnection: keep-alive\r\nKeep-Alive: 5\r\n"))
        assert answer == b"".join([HEAD, *EVENTS])
        (request,) = side.upstream.requests
        head, _, body = request.partition(b"\r\n\r\n")
        assert body == BODY
        assert head.split(b"\r\n") == [
            b"POST /v1/chat/completions HTTP/1.1",
            b"Host: 127.0.0.1:%d" % side.upstream.port,
            b"Connection: close",
            b"Authorization: Bearer key",
            b"content-length: %d" % len(BODY),
            b"X-Own: kept",
        ]

    run(case, tmp_path)


def test_a_stream_passes_piece_by_piece(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        side.upstream.go_on.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(side.post())
        assert await reader.readuntil(b"\n\n") == HEAD + EVENTS[0]  # while the server has not sent the rest
        side.upstream.go_on.set()
        assert await reader.read() == EVENTS[1]
        writer.close()

    run(case, tmp_path)


def test_a_long_body_passes(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        body = bytes(range(256)) * 20_000
        side.upstream.reply = lambda: [HEAD, side.upstream.requests[-1][-10:]]
        assert (await side.ask(side.post(body))).endswith(body[-10:])
        assert side.upstream.requests[0].endswith(b"\r\n\r\n" + body)

    run(case, tmp_path)


def test_a_client_that_leaves_is_noticed(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        side.upstream.go_on.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(side.post())
        await reader.readuntil(b"\n\n")
        writer.transport.abort()
        await side.upstream.left.wait()

    run(case, tmp_path)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((404, b"no such page"), "status 404"),
        ((200, b"{}"), "evidence is what cannot be read"),
        ((429, b"later"), "status 429"),
    ],
)
def test_no_evidence_sends_nothing(answer: tuple[int, bytes], told: str, tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        side.upstream.answer = lambda _nonce: answer
        message = await side.refused("attestation_refused")
        assert told in message
        assert message.startswith("nothing was sent: refused: ")

    run(case, tmp_path)


def test_a_server_swapped_after_verification_gets_nothing(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        await side.pinned.verify()
        side.upstream.use(SECOND)
        assert "certificate-sha256" in await side.refused("attestation_refused")

    run(case, tmp_path)


def test_a_server_swapped_in_mid_stream_keeps_its_stream_and_gets_no_more(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        side.upstream.go_on.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(side.post())
        await reader.readuntil(b"\n\n")
        await filled(side.pinned)
        side.upstream.use(SECOND)
        side.upstream.requests.clear()
        side.clock[0] += SPARE_S + 1
        await side.refused("attestation_refused")
        side.upstream.go_on.set()
        assert await reader.read() == EVENTS[1]
        writer.close()

    run(case, tmp_path)


def test_evidence_that_grows_old_is_asked_for_again(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        await side.ask(side.post())
        await filled(side.pinned)
        side.upstream.requests.clear()
        side.clock[0] += 101
        side.upstream.answer = lambda _nonce: (503, b"the TEE gives no quote")
        assert "status 503" in await side.refused("attestation_refused")

    run(case, tmp_path)


def test_a_server_that_is_down_is_one_line_and_comes_back(tmp_path: Path) -> None:
    async def whole() -> None:
        upstream = Upstream(FIRST, tmp_path)
        async with upstream.running() as address:
            pass
        pinned = PinnedServer(parse_server(address), policy(["none"]), Without(), max_age_s=100.0)
        listening = await Proxy(pinned).listen(0)
        side = Side(upstream, pinned, listening.sockets[0].getsockname()[1], [])
        assert "no connection to https://127.0.0.1" in await side.refused("server_unreachable")
        async with upstream.running():
            assert (await side.ask(side.post())).endswith(EVENTS[1])
        listening.close()
        pinned.close()
        await settled()

    asyncio.run(whole())


def test_a_connection_that_ends_without_an_answer_is_told(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        side.upstream.reply = list
        answer = await side.ask(side.post())
        assert b"502 Bad Gateway" in answer
        assert b"server_lost" in answer

    run(case, tmp_path)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "169.254.169.254", "", "localhost.evil.example"])
def test_a_page_of_a_browser_is_kept_out_by_its_host(host: str, tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        answer = await side.ask(side.post(host=host or " "))
        assert answer.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 "))
        assert (side.upstream.requests, side.upstream.connections) == ([], 0)

    run(case, tmp_path)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:9"])
def test_names_of_this_machine_are_let_in(host: str, tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        assert (await side.ask(side.post(host=host))).endswith(EVENTS[1])

    run(case, tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET http://127.0.0.1/v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * HEAD_BYTES,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: 127.0.0.1\r\n\r\n",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_request_goes_nowhere(data: bytes, tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))
        assert (side.upstream.requests, side.upstream.connections) == ([], 0)

    run(case, tmp_path)


def test_the_state_is_shown(tmp_path: Path) -> None:
    async def case(side: Side) -> None:
        async def state() -> dict[str, Any]:
            answer = await side.ask(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return dict(json.loads(answer.partition(b"\r\n\r\n")[2]))

        before = await state()
        assert (before["verified"], before["keys"], before["passed_on"]) == (False, [], 0)
        await side.ask(side.post())
        side.clock[0] += 50
        after = await state()
        assert (after["verified"], after["passed_on"], after["refusal"]) == (True, 1, None)
        assert (after["keys"][0]["protection"], after["keys"][0]["age_s"]) == ("masked", 50.0)
        await filled(side.pinned)
        side.upstream.use(SECOND)
        side.clock[0] += 101
        await side.ask(side.post())
        assert (await state())["refusal"].startswith("refused: certificate-sha256 is ")
        side.upstream.answer = honest(SECOND)
        await side.ask(side.post())
        assert (await state())["passed_on"] == 2

    run(case, tmp_path)
