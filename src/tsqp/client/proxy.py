"""An OpenAI endpoint on loopback for any client: passes requests on to a server that was verified.

A connection carries one request. Its head is read here, so that the server sees its own name in it; all other bytes,
of the body and of the whole answer, pass as they are. The first byte of a request leaves only on a connection that
``PinnedServer`` has handed out; where there is none, the client gets an error and the server nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import h11

from tsqp.client.pinning import Pinned, PinnedServer
from tsqp.errors import EvidenceRefused, TsqpError

HEAD_BYTES = 64 << 10
HEAD_S = 30.0  # for a client to send the head of its request
PIECE_BYTES = 64 << 10
MAX_CONNECTIONS = 256
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
STATUS = b"/status"
OF_THE_HOP = {b"host", b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"upgrade"}


class Proxy:
    """Serves clients of this machine from ``pinned``."""

    def __init__(self, pinned: PinnedServer, told: Callable[[str], None] = lambda _line: None) -> None:
        self._pinned = pinned
        self._told = told
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self.passed_on = 0  # requests whose first byte has left

    async def listen(self, port: int) -> asyncio.Server:
        """On loopback; port 0 takes a free one. Raises OSError."""
        return await asyncio.start_server(self._serve, "127.0.0.1", port, limit=HEAD_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._places:
                await self._answer(reader, writer)
        except (ConnectionError, TimeoutError):
            pass  # the client has left
        finally:
            with suppress(ConnectionError):
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request, rest = await asyncio.wait_for(read_head(reader), HEAD_S)
        except h11.RemoteProtocolError as error:
            await _refuse(writer, 400, f"no HTTP request: {error}", "bad_request")
            return
        if not _named_here(request):
            await _refuse(writer, 403, "this proxy answers to localhost and 127.0.0.1 only", "host_refused")
        elif request.target == STATUS and request.method == b"GET":
            await _write(writer, 200, self.status())
        else:
            await self._pass_on(request, rest, reader, writer)

    async def _pass_on(
        self, request: h11.Request, rest: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            upstream = await self._pinned.open()
        except TsqpError as error:
            code = "attestation_refused" if isinstance(error, EvidenceRefused) else "server_unreachable"
            await _refuse(writer, 502, f"nothing was sent: {error}", code)
            return
        self.passed_on += 1
        try:
            answered = await self._exchange(upstream, self._head(request) + rest, reader, writer)
        finally:
            upstream.close()
        if not answered:
            await _refuse(writer, 502, f"{self._pinned.server} ended the connection without an answer", "server_lost")

    async def _exchange(
        self, upstream: Pinned, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Both directions until the answer ends, or the client leaves; whether a byte of an answer came."""
        try:
            upstream.writer.write(head)
        except ConnectionError:
            return False
        asked = asyncio.create_task(_pipe(reader, upstream.writer))
        answered = asyncio.create_task(_pipe(upstream.reader, writer))
        try:
            await asyncio.wait((asked, answered), return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and not answered.done() and asked.result().left:
                return True  # the client, and the server is to notice it
            return (await answered).size > 0
        finally:
            for task in (asked, answered):
                task.cancel()
            await asyncio.gather(asked, answered, return_exceptions=True)

    def _head(self, request: h11.Request) -> bytes:
        """The request as the server is to read it: under its own name, and the only one of its connection."""
        kept = [(name, value) for name, value in request.headers.raw_items() if name.lower() not in OF_THE_HOP]
        server = self._pinned.server
        host = str(server).removeprefix("https://").removesuffix(":443").encode()
        lines = [b"%b %b HTTP/1.1" % (request.method, request.target), b"Host: " + host, b"Connection: close"]
        return b"\r\n".join([*lines, *(b"%b: %b" % pair for pair in kept), b"", b""])

    def status(self) -> dict[str, object]:
        """What is verified now; of the state of the proxy, and of no request."""
        now = self._pinned.clock()
        keys = [
            {
                "key": key,
                "kind": one.evidence.kind,
                "protection": one.evidence.configuration.protection,
                "model_digest": one.evidence.model_digest,
                "age_s": round(now - one.at, 1),
            }
            for key, one in self._pinned.verified.items()
        ]
        return {
            "server": str(self._pinned.server),
            "verified": bool(keys),
            "keys": keys,
            "refusal": self._pinned.refusal,
            "passed_on": self.passed_on,
        }


@dataclass(frozen=True)
class _Passed:
    """How a direction ended: after ``size`` bytes, and whether its source has left, or its target takes no more."""

    size: int
    left: bool


async def _pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> _Passed:
    size = 0
    while True:
        try:
            piece = await source.read(PIECE_BYTES)
        except ConnectionError:
            piece = b""
        if not piece:
            return _Passed(size, left=True)
        size += len(piece)
        try:
            target.write(piece)
            await target.drain()
        except ConnectionError:
            return _Passed(size, left=False)


async def read_head(reader: asyncio.StreamReader) -> tuple[h11.Request, bytes]:
    """The head of one request and what came behind it. Raises h11.RemoteProtocolError, ConnectionError."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
    while True:
        piece = await reader.read(PIECE_BYTES)
        if not piece:
            raise ConnectionResetError("the client has left")
        parser.receive_data(piece)
        event = parser.next_event()
        if isinstance(event, h11.Request):
            return event, parser.trailing_data[0]


def _named_here(request: h11.Request) -> bool:
    """Whether a client of this machine meant this proxy: a page of a browser that does not is kept out by its Host."""
    hosts = [value for name, value in request.headers if name == b"host"]
    name = hosts[0].decode("ascii", "replace") if hosts else ""
    bare = name if name.endswith("]") else name.rsplit(":", 1)[0]
    return bare in LOOPBACK_NAMES and request.target.startswith(b"/")


async def _refuse(writer: asyncio.StreamWriter, status: int, message: str, code: str) -> None:
    """An error of the form that clients of OpenAI know."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    await _write(writer, status, {"error": {"message": message, "type": kind, "param": None, "code": code}})


async def _write(writer: asyncio.StreamWriter, status: int, body: dict[str, object]) -> None:
    data = json.dumps(body).encode()
    reason = {200: "OK", 400: "Bad Request", 403: "Forbidden", 502: "Bad Gateway"}[status]
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    writer.write(head.encode() + b"x-should-retry: false\r\nconnection: close\r\n\r\n" + data)
    await writer.drain()
