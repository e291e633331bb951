"""A TLS server for a proxy's tests: gives evidence, answers chats as a stream, and keeps the head of every request.

It runs in the loop of the test, so that a test may change its certificate or its answers at any moment.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.client.evidence_server import Answer, honest
from tests.tee.certificates import KeyPair
from tsqp.client.pinning import PinnedServer

EVENTS = [b"data: {}\n\n", b"data: [DONE]\n\n"]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


class Upstream:
    """``pair``: of the certificate for new connections. ``answer``: to questions for evidence."""

    def __init__(self, pair: KeyPair, directory: Path) -> None:
        self._directory = directory
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.requests: list[bytes] = []  # all bytes of each request but questions for evidence
        self.questions = 0
        self.connections = 0
        self.answer: Answer = honest(pair)
        self.go_on = asyncio.Event()  # answers stop after their first event until this is set
        self.go_on.set()
        self.left = asyncio.Event()  # a client went away in an answer
        self.reply: Callable[[], list[bytes]] = lambda: [HEAD, *EVENTS]
        self.port = 0
        self.use(pair)

    def use(self, pair: KeyPair) -> None:
        """For connections from now on."""
        self._context.load_cert_chain(pair.write(self._directory))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Its address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"https://127.0.0.1:{self.port}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /v1/attestation?nonce="):
                self.questions += 1
                status, body = self.answer(head.split(b"nonce=")[1].split(b" ")[0].decode())
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
                await writer.drain()
                return
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
            body = await reader.readexactly(int(lengths[0].split()[1])) if lengths else b""
            self.requests.append(head + body)
            for number, piece in enumerate(self.reply()):
                if number == 2 and not await self._may_go_on(reader):
                    return
                writer.write(piece)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _may_go_on(self, reader: asyncio.StreamReader) -> bool:
        """Wait for ``go_on``; False, and ``left`` is set, when the client goes away first."""
        told, gone = asyncio.ensure_future(self.go_on.wait()), asyncio.ensure_future(reader.read(1))
        await asyncio.wait((told, gone), return_when=asyncio.FIRST_COMPLETED)
        for one in (told, gone):
            one.cancel()
        await asyncio.gather(told, gone, return_exceptions=True)
        if not self.go_on.is_set():
            self.left.set()
        return self.go_on.is_set()


async def filled(pinned: PinnedServer) -> None:
    """Wait until connections for requests to come are open: one that is opened later has a later certificate."""
    if pinned._filling is not None:
        await pinned._filling


async def settled() -> None:
    """End all else that runs in this loop, and let what it has closed be closed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(others or {asyncio.ensure_future(asyncio.sleep(0))}, timeout=0.2)
    for one in others:
        one.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for _ in range(5):
        await asyncio.sleep(0)
